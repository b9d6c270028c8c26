"""The unpruned base as teacher, without a second copy of its weights: the training model with LoRA and plan off."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from tpcompress.families import Parts
from tpcompress.inference import inference
from tpcompress.insertion.attach import is_attached, mode
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.context import StepContext
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.teachers.base import Teacher, check_answers


class AdapterOff(Teacher):
    """The model without its adapters, modules_to_save and plan: one more forward call, no memory for weights.

    Raises:
        ValueError: the recipe has no LoRA, or one that changes the base itself (pissa, olora, trained biases).
    """

    is_the_model_without_adapters = True

    def prepare(self, base: nn.Module, parts: Parts, plan: PruningPlan | None, lora: Mapping[str, Any] | None) -> None:
        if lora is None:
            raise ValueError("Teacher AdapterOff needs lora; set model.lora, or use teacher FrozenCopy.")

    def __call__(self, ctx: StepContext, batch: Mapping[str, Any], student: Pass, progress: float) -> Pass:
        model: Any = ctx.model
        with ExitStack() as stack:
            stack.enter_context(inference(model))
            stack.enter_context(model.disable_adapter())
            if is_attached(model):
                stack.enter_context(mode(model, "off"))
            teacher = run_pass(model, batch, own=student.own_AC is not None)
        check_answers(student, len(teacher.targets_A))
        return teacher
