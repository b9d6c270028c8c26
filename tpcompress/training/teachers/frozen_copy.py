"""The unpruned base as teacher: a frozen copy of its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tpcompress.families import Parts
from tpcompress.inference import inference
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.context import StepContext
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.teachers.base import Teacher, check_answers


class FrozenCopy(Teacher):
    """A copy of the base as it was loaded, for recipes that train its weights. It is neither trained nor saved.

    One more forward call per step, and a second copy of the weights on every device.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None  # not a submodule of the LightningModule, so it is neither moved nor saved
        self.device: torch.device | None = None

    def prepare(self, base: nn.Module, parts: Parts, plan: PruningPlan | None, lora: Mapping[str, Any] | None) -> None:
        self.model = copy.deepcopy(base).eval().requires_grad_(False)

    def __call__(self, ctx: StepContext, batch: Mapping[str, Any], student: Pass, progress: float) -> Pass:
        assert self.model is not None, "prepare comes before the first call"
        if self.device != ctx.device:
            self.model.to(ctx.device)
            self.device = ctx.device
        with inference(self.model):
            teacher = run_pass(self.model, batch, own=student.own_AC is not None)
        check_answers(student, len(teacher.targets_A))
        return teacher
