"""DivPrune: retain the subset whose closest pair is farthest apart, greedily (arXiv 2503.02175, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.greedy import Criterion, cosines, first_picks, greedy, row_of


class DivPrune(Pruner):
    """d(i, j) = 1 - cos(x_i, x_j); first pick argmax_i min_{j != i} d(i, j), then argmax_i min_{j in S} d(i, j).

    needs  nothing.     gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last).
    Paper: 0.098 of the tokens (56 of LLaVA-1.5's 576), before the language model.
    Cost: one V x V Gram matrix, then V work per pick.
    Unlike the official code: batched, padding-safe, fp32, and a picked token is never picked again. With `compat` it
    may be, as there: once every token has a duplicate in the set, all further picks are lost, and fewer tokens stay
    than asked for. Order of the sequence: ascending, as in the released code (the paper's tables kept the order of
    the picks).
    """

    name = "divprune"
    paper = "2503.02175"
    group = "duplication and diversity"
    paper_plan = """
    # DivPrune: 64 of LLaVA-1.5's 576 tokens that lie far apart, before the language model.
    stages:
      - {pruner: divprune, keep_tokens: 64}
    positions: compact
    """
    inexact_arguments = ({"compat": True},)

    def __init__(self, compat: bool = False) -> None:
        super().__init__()
        self.compat = compat
        self.exact_count = not compat

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        order_BV = farthest_points(tokens.vision_BVD, tokens.valid_BV, int(num_keep_B.max()), self.compat)
        return first_picks(order_BV, tokens.valid_BV, num_keep_B)


def farthest_points(vision_BVD: Tensor, valid_BV: Tensor, num_picks: int, repeat: bool = False) -> Tensor:
    """Order of the greedy max-min picks.

    Args:
        vision_BVD: features (B, V, D).
        valid_BV: bool (B, V).
        num_picks: how many picks to make; rows with fewer valid tokens end with padding.
        repeat: a token may be picked again, and such a pick is lost, as in the official code.

    Returns:
        int64 (B, V): 0 for the first pick, 1 for the next, ...; V for tokens never picked. Ties: the earlier token.
    """
    return greedy(_Farthest(1 - cosines(vision_BVD), valid_BV), valid_BV, num_picks, repeat)


class _Farthest(Criterion):
    """Distance to the nearest pick; before the first one, to the nearest other token."""

    def __init__(self, distance_BVV: Tensor, valid_BV: Tensor) -> None:
        self.distance_BVV, self.started = distance_BVV, False
        itself_VV = torch.eye(valid_BV.shape[1], dtype=torch.bool, device=valid_BV.device)
        self.nearest_BV = distance_BVV.masked_fill(itself_VV | ~valid_BV[:, None], torch.inf).amin(-1)

    def score(self, open_BV: Tensor) -> Tensor:
        return self.nearest_BV

    def take(self, pick_B1: Tensor) -> None:
        row_BV = row_of(self.distance_BVV, pick_B1)
        self.nearest_BV = self.nearest_BV.minimum(row_BV) if self.started else row_BV
        self.started = True
