"""Operators of torch that its ONNX exporter does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OPSET = 18
"""Version of the ONNX operators that graphs use."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Translations by torch operator, for `custom_translation_table`."""
    from onnx import TensorProto
    from onnxscript import opset18

    op: Any = opset18  # its types name no unions of tensor types

    def sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """ONNX breaks ties of TopK by the lower index, so that it is stable in both directions."""
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        plain = op.Cast(self, to=_sortable(self))
        values, indices = op.TopK(plain, size, axis=dim, largest=int(descending), sorted=1)
        return op.CastLike(values, self), indices

    def cummax(self: Any, dim: int) -> Any:
        """Largest value so far, of integers along the last dimension: the maximum over a triangle."""
        if dim not in (-1, len(self.shape) - 1) or int(self.dtype) not in (TensorProto.INT64, TensorProto.INT32):
            raise NotImplementedError("cummax of other than integers along the last dimension")
        size = op.Gather(op.Shape(self), op.Constant(value_int=-1))
        place = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
        seen = op.LessOrEqual(place, op.Unsqueeze(place, op.Constant(value_ints=[1])))
        wide = op.Cast(op.Unsqueeze(self, op.Constant(value_ints=[-2])), to=TensorProto.INT64)
        open_to = op.Where(seen, wide, op.Constant(value_int=-(2**62)))
        values = op.ReduceMax(open_to, op.Constant(value_ints=[-1]), keepdims=0)
        return op.CastLike(values, self), op.ArgMax(open_to, axis=-1, keepdims=0, select_last_index=1)

    return {torch.ops.aten.sort.stable: sort_stable, torch.ops.aten.cummax.default: cummax}


def _sortable(value: Any) -> int:
    """A type that ONNX Runtime sorts, as the number of the ONNX type: floats as they are, the rest as int64."""
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.DOUBLE)
    return int(value.dtype) if int(value.dtype) in floats else TensorProto.INT64
