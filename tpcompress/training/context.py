"""What losses, teachers and diagnostics may read of a run at one training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan


@dataclass(frozen=True, eq=False)
class StepContext:
    """The run at one training step.

    Attributes:
        model: the model that trains, with LoRA and the plan attached.
        parts: its vision tower, projector, decoder layers and text config.
        plan: the pruning plan; None for a dense run.
        step: optimizer steps done.
        device: device of the model.
        per_sample: losses are means over samples, not over answer tokens.
    """

    model: nn.Module
    parts: Parts
    plan: PruningPlan | None
    step: int
    device: torch.device
    per_sample: bool = False
