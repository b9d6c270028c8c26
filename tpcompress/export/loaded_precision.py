"""What no loader reproduces: `model.to(bfloat16)` also rounds rotary frequencies and scorers, loading never does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpcompress.insertion.attach import PRUNERS

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def as_loaded(base: PreTrainedModel) -> Iterator[None]:
    """Run a block with the buffers and pruner precision that the exported model will have once it is loaded."""
    buffers = [(m, name, m._buffers[name]) for m, name in _rounded_buffers(base)]
    weights = [p for p in _pruners(base).parameters() if p.dtype in HALF]
    before = [p.data for p in weights]
    try:
        for module, name, old in buffers:
            assert isinstance(old, Tensor)
            module._buffers[name] = old.float()
        for module in dict.fromkeys(module for module, _, _ in buffers):
            base._init_weights(module)  # what from_pretrained makes such buffers with
        for parameter in weights:
            parameter.data = parameter.data.float()
        yield
    finally:
        for module, name, old in buffers:
            module._buffers[name] = old
        for parameter, data in zip(weights, before, strict=True):
            parameter.data = data


def is_rounded(base: PreTrainedModel) -> bool:
    """The model was cast in a way that loading does not repeat."""
    return bool(_rounded_buffers(base)) or any(p.dtype in HALF for p in _pruners(base).parameters())


def _rounded_buffers(base: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Buffers that are not in the checkpoint and should be float32, in half precision."""
    return [
        (module, name)
        for module in base.modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None and buffer.dtype in HALF
    ]


def _pruners(base: PreTrainedModel) -> nn.Module:
    found: Any = getattr(base, PRUNERS)
    return found
