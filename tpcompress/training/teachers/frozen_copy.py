"""The unpruned base as teacher: a frozen copy of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from tpcompress.inference import inference
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.teachers.base import Teacher, check_answers


class FrozenCopy(Teacher):
    """A copy of the base as it was loaded: for recipes that train its weights. It is neither trained nor saved.

    One more forward call, and memory for the weights once more, on every device.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None  # no submodule of anything: Lightning must not find it
        self.device: Any = None

    def prepare(self, module: Any, base: nn.Module) -> None:
        self.model = copy.deepcopy(base).eval().requires_grad_(False)

    def __call__(self, module: Any, batch: Mapping[str, Any], here: Pass, progress: float) -> Pass:
        assert self.model is not None, "prepare comes before the first call"
        if self.device != module.device:
            self.model.to(module.device)
            self.device = module.device
        with inference(self.model):
            taught = run_pass(self.model, batch, own=here.own_AC is not None)
        check_answers(here, len(taught.targets_A))
        return taught
