"""Gathers columns of a sequence, and reads and writes the values of vision tokens.

B samples, N columns, R budget rows, V vision tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without a sync."""
    return x.to(device, non_blocking=True)


def take(x: Tensor, index_BN: Tensor, dim: int) -> Tensor:
    """Columns of a tensor along its sequence dimension, sample by sample.

    Args:
        x: (..., B or 1, S, ...), with the batch dimension right before the sequence (also for M-RoPE positions).
        index_BN: columns to take.
        dim: the sequence dimension.
    """
    dim = dim % x.ndim
    return _gather(x, index_BN, dim - 1, dim)


def take_square(mask_BHSS: Tensor, index_BN: Tensor) -> Tensor:
    """Rows and columns of a 4-D mask (B or 1, H or 1, S, S)."""
    return _gather(_gather(mask_BHSS, index_BN, 0, 2), index_BN, 0, 3)


def _gather(x: Tensor, index_BN: Tensor, batch: int, dim: int) -> Tensor:
    if x.shape[batch] != index_BN.shape[0]:
        x = x.expand(*[index_BN.shape[0] if i == batch else -1 for i in range(x.ndim)])
    view, target = [1] * x.ndim, list(x.shape)
    view[batch], view[dim] = index_BN.shape
    target[dim] = index_BN.shape[1]
    return x.gather(dim, index_BN.view(view).expand(target))


def put_tokens(hidden_BND: Tensor, cell_RV: Tensor, valid_RV: Tensor, value_RVD: Tensor, ragged: bool) -> Tensor:
    """Write new values of vision tokens into the sequence; those of padding are written to a row that is discarded."""
    B, N, D = hidden_BND.shape
    flat_MD = hidden_BND.reshape(B * N, D)
    if ragged:
        flat_MD = torch.cat([flat_MD, flat_MD.new_zeros(1, D)])
        cell_RV = cell_RV.masked_fill(~valid_RV, B * N)
    flat_MD = flat_MD.index_copy(0, cell_RV.reshape(-1), value_RVD.reshape(-1, D).to(flat_MD.dtype))
    return flat_MD[: B * N].view(B, N, D)


def get_tokens(hidden_BND: Tensor, cell_RV: Tensor) -> Tensor:
    """Vision tokens (R, V, D) of the sequence; padded entries hold arbitrary tokens."""
    return hidden_BND.reshape(-1, hidden_BND.shape[-1]).index_select(0, cell_RV.reshape(-1)).view(*cell_RV.shape, -1)
