"""Memory for the joint inputs of a batch, which are tens of megabytes and touched for the first time when filled."""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

HUGE = 16 << 20
"""Bytes from which pages of 2 MiB are asked for; smaller tensors mostly reuse memory."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor.

    In a worker process it is in shared memory, as that of torch's own collation, so that it is not copied on its way to
    the training process. Elsewhere a large one has huge pages where Linux grants them: with pages of 4 KiB, touching
    new memory takes several times as long as copying into it.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if not size:
        return torch.empty(*shape, dtype=dtype)
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(size)
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
