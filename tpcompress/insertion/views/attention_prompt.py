"""View `attention_prompt`: attention of every text token of the prompt in the layer before the stage."""

from __future__ import annotations

from torch import Tensor

from tpcompress.insertion.views.flex_attention import unreadable_masks
from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext


@provides("attention_prompt", why_unavailable=unreadable_masks)
def attention_prompt(stage: StageContext) -> dict[str, Tensor]:
    """Fields of the view."""
    prompt = stage.prompt_fields()
    weight_BHQN = stage.attention(stage.before, stage.prompt_column_BQ)
    weight_RHQV = stage.to_tokens(stage.sequence(weight_BHQN))
    # There may be more queries than text tokens: rows of an answer must not be seen.
    no_text_R1Q1 = (prompt["prompt_role_BQ"] == 0)[:, None, :, None]
    return {"attention_prompt_BHQV": weight_RHQV.masked_fill(no_text_R1Q1, 0.0), **prompt}
