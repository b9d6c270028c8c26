"""Run a model in eval mode without gradients for a while, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in eval mode.

    Afterwards every submodule is in the mode it was in, and every parameter requires a gradient if it did before: PEFT
    lets all adapters require one when it re-enables them.
    """
    training = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, before in training:
            module.training = before
        for parameter, required in wanted:
            parameter.requires_grad_(required)
