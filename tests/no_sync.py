"""A dispatch mode that raises at every host-device sync that a GPU would need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class NoSync(TorchDispatchMode):
    """Raises where a GPU would make the host wait. What is computed from host numbers alone may be read."""

    def __init__(self) -> None:
        super().__init__()
        self.host: list[Tensor] = []
        self.seen = 0
        self.masks_made = 0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        known = bool(tensors) and all(any(t is h for h in self.host) for t in tensors)
        self.seen += 1
        picks = func is aten.index.Tensor and any(t.dtype == torch.bool for t in tensors[1:])
        if (func in WAITS or picks) and not known and not self.paused:
            raise AssertionError(f"{func} makes the host wait for the device")
        out = func(*args, **(kwargs or {}))
        if func is aten.lift_fresh.default or known:  # torch.tensor([...]), and what follows from it
            self.host += [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        return out
