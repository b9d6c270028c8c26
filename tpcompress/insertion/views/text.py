"""View `text`: hidden states of the sequence, and which of them are text tokens of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext
from tpcompress.pruners.views import INSTRUCTION


@provides("text", gradient=True)
def text(stage: StageContext) -> dict[str, Tensor]:
    """Fields of the view."""
    instruction_RN = stage.role_RN == INSTRUCTION
    return {
        "text_BSD": stage.sequence(stage.hidden_BND),
        "column_BV": stage.column_RV,
        "text_role_BS": stage.role_RN,
        "text_valid_BS": torch.where(instruction_RN.any(1, keepdim=True), instruction_RN, stage.role_RN > 0),
    }
