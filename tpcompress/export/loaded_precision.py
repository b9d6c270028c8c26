"""Restores the precision that a loaded export has in a model that was cast as a whole.

`model.to(bfloat16)` also rounds rotary frequencies and pruner weights; `from_pretrained` keeps both in float32.
"""

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
    """Run a block with buffers and pruner weights in the precision that they have after loading the export."""
    buffers = [(m, name, m._buffers[name]) for m, name in _rounded_buffers(base)]
    weights = [p for p in _pruners(base).parameters() if p.dtype in HALF]
    before = [p.data for p in weights]
    try:
        for module, name, old in buffers:
            assert isinstance(old, Tensor)
            module._buffers[name] = old.float()
        for module in dict.fromkeys(module for module, _, _ in buffers):
            base._init_weights(module)  # from_pretrained computes such buffers with it
        for parameter in weights:
            parameter.data = parameter.data.float()
        yield
    finally:
        for module, name, old in buffers:
            module._buffers[name] = old
        for parameter, data in zip(weights, before, strict=True):
            parameter.data = data


def is_rounded(base: PreTrainedModel) -> bool:
    """Whether the model has buffers or pruner weights in half precision that loading keeps in float32."""
    return bool(_rounded_buffers(base)) or any(p.dtype in HALF for p in _pruners(base).parameters())


def _rounded_buffers(base: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Half-precision buffers that are not in the checkpoint, as (module, name)."""
    return [
        (module, name)
        for module in base.modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None and buffer.dtype in HALF
    ]


def _pruners(base: PreTrainedModel) -> nn.Module:
    found: Any = getattr(base, PRUNERS)
    return found
