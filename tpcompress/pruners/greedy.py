"""Greedy picks, one token after another: the loop that several pruners share, and facility location for it.

B rows, V tokens, D feature size, M tokens looked at together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Selection
from tpcompress.pruners.topk import SAME, on

BLOCK = 16
"""Candidates that lazy greedy looks at first; twice as many each time that they do not settle a pick."""
SMALL = 2**19
"""Up to this many similarities, looking at all gains costs less than keeping bounds."""


class Criterion:
    """What each token is worth, given the tokens picked so far."""

    def score(self, open_BV: Tensor) -> Tensor:
        """Finite numbers (B, V), higher = next, for the tokens that may still be picked."""
        raise NotImplementedError(f"{type(self).__name__} must define score(open_BV) -> (B, V).")

    def take(self, pick_B1: Tensor) -> None:
        """Learn of the token picked in each row."""

    def best(self, open_BV: Tensor) -> Tensor:
        """The pick of each row, int64 (B, 1); ties go to the earlier token."""
        return self.score(open_BV).masked_fill(~open_BV, -torch.inf).argmax(1, keepdim=True)


def greedy(criterion: Criterion, valid_BV: Tensor, num_picks: int, repeat: bool = False) -> Tensor:
    """Pick the best token again and again.

    Args:
        criterion: what is best; it changes with every pick.
        valid_BV: bool (B, V); padding is never picked.
        num_picks: how many picks to make; rows with fewer valid tokens stop when they have none left.
        repeat: a token may be picked again, and such a pick is lost.

    Returns:
        int64 (B, V): 0 for the first pick, 1 for the next, ...; V for tokens never picked.
    """
    V = valid_BV.shape[1]
    order_BV = torch.full(valid_BV.shape, V, device=valid_BV.device)
    open_BV = valid_BV.clone()
    for step in range(min(num_picks, V)):
        pick_B1 = criterion.best(open_BV)
        before_B1 = order_BV.gather(1, pick_B1)
        # A row that has run out of tokens answers anything.
        order_BV.scatter_(1, pick_B1, torch.where(open_BV.gather(1, pick_B1), before_B1.clamp(max=step), before_B1))
        if not repeat:
            open_BV.scatter_(1, pick_B1, False)
        criterion.take(pick_B1)
    return order_BV


def first_picks(order_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Selection:
    """The first `num_keep` picks of each row; scores_BV = - order of the pick, unpicked tokens last."""
    return Selection((order_BV < on(num_keep_B, order_BV)[:, None]) & valid_BV, -order_BV.float())


def cosines(x_BVD: Tensor) -> Tensor:
    """Cosine similarity of all pairs of a row, fp32 (B, V, V); at most 1, and exactly 1 for duplicates."""
    unit_BVD = F.normalize(x_BVD.float(), dim=-1)
    similar_BVV = unit_BVD @ unit_BVD.mT
    return similar_BVV.masked_fill_(similar_BVV > 1 - SAME, 1.0)


def products(x_BVD: Tensor, y_BD: Tensor) -> Tensor:
    """Inner product of each token and one vector, (B, V).

    Token by token, because a product of matrices rounds equal tokens differently where blocks end, and so by padding.
    """
    return (x_BVD * y_BD[:, None]).sum(-1)


def on_host(x: Tensor) -> bool:
    """True if values of `x` may control a loop: in host memory and outside compiled code."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def row_of(matrix_BVV: Tensor, pick_B1: Tensor) -> Tensor:
    """Row `pick` of each matrix, (B, V)."""
    return matrix_BVV.gather(1, pick_B1[..., None].expand(-1, -1, matrix_BVV.shape[2]))[:, 0]


def stretch(scores_BV: Tensor, valid_BV: Tensor, least: float = 1e-6) -> Tensor:
    """(s - min + least) / (max - min + least) over the valid tokens of each row: in (0, 1], and 1 if all are equal."""
    scores_BV = scores_BV.float()
    low_B1 = scores_BV.masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True)
    high_B1 = scores_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True)
    return ((scores_BV - low_B1 + least) / (high_B1 - low_B1 + least)).masked_fill(~valid_BV, 0.0)


class Coverage(Criterion):
    """Facility location: gain(u) = w_u sum_j m_j max(0, s(u, j) - c_j), c_j = max(start, max over picks k of s(k, j)).

    On an accelerator every pick looks at all gains: a fixed number of steps, and no sync. In host memory it is
    lazy: gains only fall, so one from an earlier pick is a bound on today's, and a token whose fresh gain beats every
    bound wins without a look at the rest. Both give the same picks, to the bit: each gain is one sum over j in
    one order, and rounding keeps it falling, because every step of it (s - c, times m, plus, times w) rounds
    monotonously.

    Args:
        similar_BVV: symmetric similarity (B, V, V).
        demand_BV: how much it matters to cover a token, m >= 0; 0 on padding.
        weight_BV: how much a candidate counts, w >= 0; 1 without it.
        start: how well every token counts as covered without any pick.
        lazy: whether bounds are used; without it, where they pay off and need no host-device sync.
    """

    def __init__(
        self,
        similar_BVV: Tensor,
        demand_BV: Tensor,
        weight_BV: Tensor | None = None,
        start: float = 0.0,
        lazy: bool | None = None,
    ) -> None:
        self.similar_BVV, self.demand_BV, self.weight_BV = similar_BVV, demand_BV, weight_BV
        self.covered_BV = torch.full_like(demand_BV, start)
        if lazy is None:
            lazy = on_host(similar_BVV) and similar_BVV.numel() > SMALL
        self.bound_BV = self.gains(similar_BVV, weight_BV) if lazy else None

    def gains(self, similar_BMV: Tensor, weight_BM: Tensor | None) -> Tensor:
        """What M candidates would add now, (B, M)."""
        more_BMV = (similar_BMV - self.covered_BV[:, None]).clamp_(min=0)
        # Added up in fp64: the order of a sum, which padding changes, must not break a near tie another way.
        gain_BM = more_BMV.mul_(self.demand_BV[:, None]).sum(-1, dtype=torch.float64).float()
        return gain_BM if weight_BM is None else gain_BM * weight_BM

    def score(self, open_BV: Tensor) -> Tensor:
        return self.gains(self.similar_BVV, self.weight_BV)

    def take(self, pick_B1: Tensor) -> None:
        self.covered_BV = self.covered_BV.maximum(row_of(self.similar_BVV, pick_B1))

    def best(self, open_BV: Tensor) -> Tensor:
        if self.bound_BV is None:
            return super().best(open_BV)
        B, V = open_BV.shape
        offset_B1 = torch.arange(0, B * V, V, device=open_BV.device)[:, None]
        fresh_BV = ~open_BV | (self.bound_BV <= 0)  # what has fallen to nothing stays there
        size = BLOCK
        while True:
            value_BV = self.bound_BV.masked_fill(~open_BV, -torch.inf)
            pick_B1 = value_BV.argmax(1, keepdim=True)
            # numpy() raises on other than host memory: this cannot become a host-device sync.
            if fresh_BV.gather(1, pick_B1).all().numpy():
                return pick_B1
            stale_BM = value_BV.masked_fill(fresh_BV, -torch.inf).topk(min(size, V)).indices
            rows_BMV = self.similar_BVV.flatten(0, 1).index_select(0, (stale_BM + offset_B1).flatten()).view(B, -1, V)
            weight_BM = None if self.weight_BV is None else self.weight_BV.gather(1, stale_BM)
            self.bound_BV.scatter_(1, stale_BM, self.gains(rows_BMV, weight_BM))
            fresh_BV.scatter_(1, stale_BM, True)
            size *= 2
