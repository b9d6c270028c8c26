"""View `attention_last_vision`: attention of each row's last vision token in the layer before the stage."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.insertion.shorten.columns import to_device_async
from tpcompress.insertion.views.flex_attention import unreadable_masks
from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext


@provides("attention_last_vision", why_unavailable=unreadable_masks)
def attention_last_vision(stage: StageContext) -> dict[str, Tensor]:
    """Fields of the view. The rows of one sample are queries of one pass."""
    rows = stage.rows
    slots = [rows.owner[:r].count(owner) for r, owner in enumerate(rows.owner)]
    slot_R = to_device_async(torch.tensor(slots), stage.column_RV.device)
    query_BQ = stage.column_RV.new_zeros(len(stage.hidden_BND), max(slots) + 1)
    query_BQ = query_BQ.index_put((rows.owner_R, slot_R), stage.last_column_R)
    weight_RHN = stage.attention(stage.before, query_BQ)[rows.owner_R, :, slot_R]
    return {"attention_last_vision_BHV": stage.to_tokens(weight_RHN[:, :, None])[:, :, 0]}
