"""Proportional attention (ToMe): the logarithm of a token's size is added to the attention logits of its key.

A softmax over keys, one of which stands for n equal ones, then equals the softmax over all of them.

B samples, N columns, Q queries, L keys of a layer's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_log_sizes(mask_BHQL: Tensor, log_size_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """A 4-D mask that adds the logarithms of sizes to the logits, (B, H, Q, L).

    Args:
        mask_BHQL: bool (True = may attend), or additive floats.
        log_size_BN: logarithms of the sizes of the first N keys; later keys have size 1.
        dtype: dtype of the result for a bool mask: that of the queries.
    """
    bias_B11L = F.pad(log_size_BN, (0, mask_BHQL.shape[-1] - log_size_BN.shape[1]))[:, None, None]
    if mask_BHQL.dtype == torch.bool:
        return torch.where(mask_BHQL, bias_B11L.to(dtype), torch.finfo(dtype).min)
    return mask_BHQL + bias_B11L.to(mask_BHQL.dtype)


def concat_log_sizes(old_BN: Tensor | None, width: int, new_BQ: Tensor | None, steps: int) -> Tensor | None:
    """Logarithms of the sizes of two neighbouring runs of columns; None if all stand for one.

    Args:
        old_BN: logarithms of the left run; None if all stand for one.
        width: N.
        new_BQ: logarithms of the right run; None if all stand for one.
        steps: Q.
    """
    if old_BN is None:
        return None if new_BQ is None else F.pad(new_BQ, (width, 0))
    return F.pad(old_BN, (0, steps)) if new_BQ is None else torch.cat([old_BN, new_BQ], 1)
