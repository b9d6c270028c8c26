"""View `keys`: keys of the sequence in the layer before the stage."""

from __future__ import annotations

from torch import Tensor

from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext


@provides("keys")
def keys(stage: StageContext) -> dict[str, Tensor]:
    """Fields of the view."""
    key_BND = stage.before.keys().transpose(1, 2).flatten(2)
    return {"keys_BVD": stage.tokens(key_BND), "text_keys_BSD": stage.sequence(key_BND)}
