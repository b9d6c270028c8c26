"""View `attention_next`: attention of the last prompt token in the layer after the stage, as if nothing was dropped."""

from __future__ import annotations

from torch import Tensor

from tpcompress.insertion.views.flex_attention import unreadable_masks
from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext


@provides("attention_next", why_unavailable=unreadable_masks)
def attention_next(stage: StageContext) -> dict[str, Tensor]:
    """Fields of the view."""
    weight_BH1N = stage.attention(stage.ahead, stage.last_prompt_B[:, None])
    return {"attention_next_BHV": stage.to_tokens(stage.sequence(weight_BH1N))[:, :, 0]}
