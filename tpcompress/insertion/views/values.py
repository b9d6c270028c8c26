"""View `values`: values of the sequence in the layer before the stage."""

from __future__ import annotations

from torch import Tensor

from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext


@provides("values")
def values(stage: StageContext) -> dict[str, Tensor]:
    """Fields of the view."""
    value_BND = stage.before.values().transpose(1, 2).flatten(2)
    return {"values_BVD": stage.tokens(value_BND), "text_values_BSD": stage.sequence(value_BND)}
