"""Builds the `TokenView` of a stage: only the views that its pruner needs, each by its provider.

R budget rows, V vision tokens, L layers of the vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.shorten.columns import to_device_async
from tpcompress.insertion.shorten.sequence import BudgetRows
from tpcompress.insertion.views.registry import providers
from tpcompress.insertion.views.stage_context import StageContext
from tpcompress.pruners import TokenView
from tpcompress.pruners.views import fields_of


def build_view(stage: StageContext, soft: bool) -> TokenView:
    """What the pruner of a stage may read.

    Args:
        stage: the stage under way.
        soft: see `TokenView.soft`.

    Raises:
        ValueError: the pruner needs views of the vision tower, and the features came without.
    """
    optional: dict[str, Any] = {}
    for name in sorted(stage.pruner.needs):
        provider = providers()[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and provider.gradient):
            if provider.capture is not None:
                optional[fields_of(name)[0]] = _captured(stage, name, provider.capture.of_layer)
            optional |= provider.provide(stage)
    table_RV4 = stage.rows.table_RV4
    return TokenView(
        vision_BVD=stage.tokens(stage.hidden_BND),
        valid_BV=stage.rows.valid_RV,
        row_BV=table_RV4[..., 0],
        col_BV=table_RV4[..., 1],
        tile_BV=table_RV4[..., 2],
        image_BV=table_RV4[..., 3],
        canvas=stage.rows.canvas,
        soft=soft,
        video_BV=_of_videos(stage.rows, table_RV4[..., 3]),
        **optional,
    )


def _of_videos(rows: BudgetRows, image_RV: Tensor) -> Tensor:
    """bool (R, V): tokens of videos, which the host knows from the layouts."""
    images = max(map(len, rows.layouts))
    flags = [[layout.video for layout in row] + [False] * (images - len(row)) for row in rows.layouts]
    return to_device_async(torch.tensor(flags), image_RV.device).gather(1, image_RV)


def _captured(stage: StageContext, name: str, of_layer: bool) -> Tensor:
    """The captured values of a view of the vision tower, in the order of the dimensions of its field."""
    (field, *_), layers = fields_of(name), stage.pruner.tower_layers if of_layer else (0,)
    suffix = field.rpartition("_")[2]
    per_layer = [_of_tokens(stage, name, layer).movedim(1, suffix.index("V") - len(suffix)) for layer in layers]
    return torch.stack(per_layer, 1) if of_layer else per_layer[0]


def _of_tokens(stage: StageContext, name: str, layer: int) -> Tensor:
    """Values (R, V, ...) of one view of one layer of the tower.

    Features fill the placeholders of their modality in the order of the flattened batch.
    """
    call, rows = stage.call, stage.rows
    flat, place, first = [], None, 0
    for modality, encoded in call.encoded.items():
        if (name, layer) not in encoded.tower:
            raise ValueError(
                f"The {modality} features of this call came without {name}: they were encoded in mode off, by another "
                f"tower, or pooled before the projector; encode them again, or use a pruner that does not need it."
            )
        values = encoded.tower[name, layer]
        here_BS = call.places[modality]
        rank_BS = (here_BS.reshape(-1).cumsum(0) - 1 + first).view(here_BS.shape)
        place = rank_BS if place is None else torch.where(here_BS, rank_BS, place)
        flat += values
        first += sum(len(value) for value in values)
    assert place is not None
    return torch.cat(flat)[place[rows.owner_R[:, None], rows.index_RV]]
