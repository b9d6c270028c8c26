"""View `input`: vision tokens and text tokens of the prompt at the language model's input."""

from __future__ import annotations

from typing import Any

from tpcompress.insertion.shorten.columns import get_tokens
from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext


@provides("input")
def at_input(stage: StageContext) -> dict[str, Any]:
    """Fields of the view. Text tokens are at hand in every later stage, as no stage drops them."""
    column_RQ, entry = stage.sequence(stage.prompt_column_BQ), stage.call.entry
    rows, frame, input_BND = entry or (stage.rows, stage.frame.as_input(), stage.hidden_BND)
    place_RQ = stage.sequence(stage.frame.base_BN).gather(1, column_RQ) if entry else column_RQ
    index_RQD = place_RQ[..., None].expand(-1, -1, input_BND.shape[-1])
    return {
        "input_vision_BUD": get_tokens(input_BND, frame.cells(rows)),
        "input_valid_BU": rows.valid_RV,
        "input_prompt_BQD": input_BND[rows.owner_R].gather(1, index_RQD),
        **stage.prompt_fields(),
    }
