"""Run a model for inference: eval mode without gradients for a block, and inputs on the model's device and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in eval mode, then restore the model.

    Afterwards every submodule is in its former mode, and every parameter requires a gradient if it did before: PEFT
    makes all adapters require one when it re-enables them.
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


def default_device() -> str:
    """The accelerator, or `cpu` without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def inputs_for(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Move inputs to the device of a model, and floating-point tensors also to its dtype.

    Args:
        model: model, or a part of one; its first parameter decides.
        inputs: inputs by name; values that are not tensors are kept.
    """
    weight = next(model.parameters())
    return {
        name: x.to(weight.device, weight.dtype if x.is_floating_point() else None) if torch.is_tensor(x) else x
        for name, x in inputs.items()
    }
