"""View `normed`: hidden states after the language model's final norm."""

from __future__ import annotations

from torch import Tensor

from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext


@provides("normed")
def normed(stage: StageContext) -> dict[str, Tensor]:
    """Fields of the view."""
    normed_BND = stage.parts.final_norm(stage.hidden_BND)
    return {"normed_BVD": stage.tokens(normed_BND), "text_normed_BSD": stage.sequence(normed_BND)}
