"""Memory for joint inputs: contents, dtypes and shapes, in the process and in workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tpcompress.data import buffers
from tpcompress.data.buffers import HUGE, empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (5,)])
def test_small_and_empty_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = empty(shape, dtype)
    assert (tuple(made.shape), made.dtype) == (shape, dtype)


def test_large_ones_can_be_written_and_outlive_their_maker() -> None:
    made = empty((HUGE // 4 + 8,), torch.float32)
    made.copy_(torch.arange(len(made)))
    assert made[-1] == len(made) - 1
    assert not made.is_shared()
    part = made[10:20].clone()
    del made
    assert part.tolist() == list(range(10, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_those_of_workers_are_shared(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "get_worker_info", lambda: SimpleNamespace(id=0))
    made = empty((3, 2), dtype)
    made.fill_(7)
    assert made.is_shared()
    assert (tuple(made.shape), made.dtype, made.sum().item()) == ((3, 2), dtype, 42)
