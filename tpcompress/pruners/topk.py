"""Exact budgets: top-k and lists of what was chosen, standardised scores, novelty, equal cells of a grid.

B rows, V tokens, K retained slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SAME = 1e-6
"""Cosines nearer to 1 than this are 1: rounding must not separate duplicates."""


def keep_topk(scores_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """The `num_keep` best valid tokens of each row; ties go to the earlier token.

    Args:
        scores_BV: real numbers (B, V).
        valid_BV: bool (B, V); padding is never kept.
        num_keep_B: int64 (B,).

    Returns:
        bool (B, V).
    """
    return (rank(scores_BV, valid_BV) < on(num_keep_B, scores_BV)[:, None]) & valid_BV


def rank(scores_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """Place of each token in its row, 0 = best; padding comes last; ties go to the earlier token."""
    # The floor keeps a token whose score is -inf ahead of padding.
    floor = torch.finfo(torch.float32).min
    masked_BV = scores_BV.float().clamp(min=floor).masked_fill(~valid_BV, -torch.inf)
    order_BV = masked_BV.argsort(dim=1, descending=True, stable=True)
    places_V = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    return torch.empty_like(order_BV).scatter_(1, order_BV, places_V.expand_as(order_BV))


def slots(chosen_BV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The chosen tokens of each row one after the other, ascending; the others after them.

    Args:
        chosen_BV: bool (B, V).
        num: how many slots; known on the host.

    Returns:
        int64 (B, K), the token of each slot, and bool (B, K), whether it is a chosen one; K = `num`, or V if less.
    """
    index_BK = (~chosen_BV).byte().argsort(dim=1, stable=True)[:, :num]
    return index_BK, chosen_BV.gather(1, index_BK)


def take(x_BVC: Tensor, index_BK: Tensor) -> Tensor:
    """The features (B, K, C) of some tokens of each row."""
    return x_BVC.gather(1, index_BK[..., None].expand(-1, -1, x_BVC.shape[-1]))


def head_mean(x_BHV: Tensor) -> Tensor:
    """Mean over heads, fp32 (B, V); added up in fp64, where tokens of equal numbers tie however long their row is."""
    return x_BHV.mean(1, dtype=torch.float64).float()


def on(num_keep_B: Tensor, like: Tensor) -> Tensor:
    """The counts on the device of `like`, without a host-device sync."""
    return num_keep_B.to(like.device, non_blocking=True)


def hash_uniform(seed: int, index: Tensor) -> Tensor:
    """A number in [0, 1) per index: a 32-bit multiply-and-xor-shift mix of (seed, index), equal on every device."""
    mixed = (seed * 0x85EBCA77 + 0x27D4EB2F) & 0xFFFFFFFF  # in Python, where no seed is too large
    bits = (index.long() * 0x9E3779B1 + mixed) & 0xFFFFFFFF
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        bits = ((bits ^ (bits >> 15)) * multiplier) & 0xFFFFFFFF
    return ((bits ^ (bits >> 16)) >> 8).float() / 2**24  # 24 bits: what fp32 holds without rounding up to 1


def standardise(scores_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """Zero mean and unit deviation over the valid tokens of each row, in fp32."""
    scores_BV = scores_BV.float()
    count_B1 = valid_BV.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = scores_BV.masked_fill(~valid_BV, 0.0).sum(1, keepdim=True) / count_B1
    centred_BV = (scores_BV - mean_B1).masked_fill(~valid_BV, 0.0)
    return centred_BV / (centred_BV.square().sum(1, keepdim=True) / count_B1 + 1e-8).sqrt()


def novelty(x_BVD: Tensor, valid_BV: Tensor) -> Tensor:
    """1 - the largest cosine similarity of each token to any earlier token, and to any other token.

    Args:
        x_BVD: features (B, V, D); no gradient reaches them.
        valid_BV: bool (B, V).

    Returns:
        fp32 (B, V, 2) in [0, 2]; 2 where there is no such token.
    """
    unit_BVD = F.normalize(x_BVD.detach().float(), dim=-1)
    similar_BVV = (unit_BVD @ unit_BVD.mT).masked_fill(~valid_BV[:, None], -1.0)
    earlier_VV = torch.ones_like(similar_BVV[0], dtype=torch.bool).tril(-1)
    earlier_BV = similar_BVV.masked_fill(~earlier_VV, -1.0).amax(-1)
    other_BV = similar_BVV.masked_fill(~(earlier_VV | earlier_VV.mT), -1.0).amax(-1)
    return 1 - torch.stack([earlier_BV, other_BV], -1)


def grid_cells(row_BV: Tensor, col_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """Cut each row's grid into exactly `num_keep` cells, none empty, as square as the counts allow.

    A grid of h x w is cut into r horizontal bands, r near sqrt(k h / w); band j gets floor((j+1) k/r) - floor(j k/r)
    cells of near-equal width. Tokens that do not fill a grid (an earlier stage thinned them) are cut into runs of
    their order instead: there the grid is 1 x n. Asked for more cells than it has tokens, a row has one for each.

    Returns:
        int64 (B, V): the cell of each token, 0 to `num_keep` - 1.
    """
    count_B1 = valid_BV.sum(1, keepdim=True)
    rows_B1 = row_BV.masked_fill(~valid_BV, -1).amax(1, keepdim=True) + 1
    cols_B1 = col_BV.masked_fill(~valid_BV, -1).amax(1, keepdim=True) + 1
    full_B1 = rows_B1 * cols_B1 == count_B1
    rows_B1, cols_B1 = torch.where(full_B1, rows_B1, 1), torch.where(full_B1, cols_B1, count_B1).clamp(min=1)
    order_BV = valid_BV.cumsum(1) - 1
    row_BV, col_BV = torch.where(full_B1, row_BV, 0), torch.where(full_B1, col_BV, order_BV)
    k_B1 = on(num_keep_B, row_BV)[:, None].minimum(count_B1).clamp(min=1)
    bands_B1 = (k_B1 * rows_B1 / cols_B1).sqrt().round().long()
    bands_B1 = bands_B1.maximum(-(-k_B1 // cols_B1)).minimum(rows_B1.minimum(k_B1)).clamp(min=1)
    band_BV = row_BV * bands_B1 // rows_B1
    first_BV = band_BV * k_B1 // bands_B1
    cells_BV = (band_BV + 1) * k_B1 // bands_B1 - first_BV
    return first_BV + col_BV * cells_BV // cols_B1


def cell_weights(cell_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """Averaging weights (B, K, V): row k holds 1 / size on the tokens of cell k, K = the largest count."""
    K = int(num_keep_B.max())
    member_BKV = (cell_BV[:, None] == torch.arange(K, device=cell_BV.device)[None, :, None]) & valid_BV[:, None]
    return member_BKV / member_BKV.sum(-1, keepdim=True).clamp(min=1)


def central(cell_BV: Tensor, row_BV: Tensor, col_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """bool (B, V): in each cell the token nearest to the mean place of its tokens; ties go to the earlier token.

    Whole numbers throughout, so that a tie is a tie: n^2 |place - mean|^2 = |n place - sum|^2 for a cell of n tokens.
    """
    B, V = cell_BV.shape
    cell_BV = cell_BV.masked_fill(~valid_BV, V)
    zero_BC = torch.zeros(B, V + 1, dtype=torch.long, device=cell_BV.device)
    size_BV = zero_BC.scatter_add(1, cell_BV, torch.ones_like(cell_BV)).gather(1, cell_BV)
    far_BV = torch.zeros_like(cell_BV)
    for place_BV in (row_BV, col_BV):
        sum_BV = zero_BC.scatter_add(1, cell_BV, place_BV).gather(1, cell_BV)
        far_BV = far_BV + (size_BV * place_BV - sum_BV).square()
    key_BV = far_BV * V + torch.arange(V, device=cell_BV.device)
    least_BC = torch.full_like(zero_BC, torch.iinfo(torch.long).max).scatter_reduce(1, cell_BV, key_BV, "amin")
    return (key_BV == least_BC.gather(1, cell_BV)) & valid_BV
