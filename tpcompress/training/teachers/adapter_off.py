"""The unpruned base as teacher, without a second copy of its weights: this model with LoRA and plan off."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from tpcompress.inference import inference
from tpcompress.insertion.attach import is_attached, mode
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.teachers.base import Teacher, check_answers


class AdapterOff(Teacher):
    """The model with its adapters, its modules_to_save and its plan off. One more forward call, no memory for weights.

    Raises:
        ValueError: there is no LoRA.
    """

    def prepare(self, module: Any, base: nn.Module) -> None:
        if module.lora is None:
            raise ValueError("Teacher AdapterOff needs lora; set it, or take teacher FrozenCopy.")

    def __call__(self, module: Any, batch: Mapping[str, Any], here: Pass, progress: float) -> Pass:
        model: Any = module.model
        with ExitStack() as stack:
            stack.enter_context(inference(model))
            stack.enter_context(model.disable_adapter())
            if is_attached(model):
                stack.enter_context(mode(model, "off"))
            taught = run_pass(model, batch, own=here.own_AC is not None)
        check_answers(here, len(taught.targets_A))
        return taught
