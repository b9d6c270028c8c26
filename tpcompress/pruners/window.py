"""Window: any rule with equal quotas for spatial windows, such as Window FastV (arXiv 2502.11501, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import Composed, place_inside, quotas
from tpcompress.pruners.topk import rank


class Window(Composed):
    """keep = the best tokens of each window by the inner rule, equally many of each, give or take one.

    Each tile or frame is cut into `rows` x `cols` windows of near-equal size. A window with fewer tokens than its quota
    leaves the rest to the others; tokens that do not divide go to the windows whose next token is best. One window per
    image is the inner rule itself.

    needs  what the inner rule needs.     gives  keep_BV, scores_BV = - place in the order above.
    Paper: FastV before layer 2; the size of its windows is not published.
    An inner rule that learns trains through its own gates, on its scores in the order of the quotas.
    Cost: two runs of the inner rule, one of them at full budget (a greedy rule then makes V picks), and sorts of V.
    Unlike the official code: none was found. Ours: 4 x 4 windows (6 x 6 tokens on LLaVA-1.5), inner rules other
    than FastV, and what becomes of a budget that the windows do not divide.
    """

    name = "window"
    paper = "2502.11501"
    only_rank = True
    group = "combination of pruners"
    paper_plan = """
    # Window FastV (arXiv 2502.11501): 144 of 576 tokens from layer 2 on, 9 of each of 16 windows of 6 x 6 by
    # attention.
    stages:
      - {pruner: window, layer: 2, keep_tokens: 144}  # 75 % pruned
    """
    test_arguments = (
        {"pruner": {"type": "novelty"}, "rows": 2, "cols": 3},
        {"pruner": {"type": "uniform"}, "rows": 1, "cols": 1},
        {"pruner": {"type": "learned_gate"}, "rows": 2, "cols": 2},
    )

    def __init__(self, pruner: Pruner | str | dict[str, Any] = "fastv", rows: int = 4, cols: int = 4) -> None:
        super().__init__(pruner=pruner)
        if rows < 1 or cols < 1:
            raise ValueError(f"window cuts into rows and cols of at least 1, got {rows} x {cols}.")
        self.rows, self.cols = rows, cols
        self.adopt()

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        if self.learned:
            return super().forward(tokens, num_keep_B)
        with torch.no_grad():
            return self._quotas(self.ranking(self.parts[0], tokens, num_keep_B), tokens, num_keep_B)

    def order(self, tokens: TokenView, scores_BV: Tensor, num_keep_B: Tensor) -> Tensor:
        return -self._quotas(rank(scores_BV, tokens.valid_BV), tokens, num_keep_B).scores_BV.long()

    def _quotas(self, place_BV: Tensor, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        return quotas(place_BV, windows(tokens, self.rows, self.cols), tokens.valid_BV, num_keep_B)


def windows(tokens: TokenView, rows: int, cols: int) -> Tensor:
    """The window of each token (B, V): token (r, c) of a tile of h x w is in window (r rows // h, c cols // w).

    Rows and columns of a tile are counted from its first one; after an earlier stage, from the first one that is left.
    """
    column_BV = torch.arange(tokens.tile_BV.shape[1], device=tokens.tile_BV.device).expand_as(tokens.tile_BV)
    # Numbers without gaps, so that there are no more tiles than tokens; padding is one of its own.
    tile_BV = place_inside(column_BV, tokens.tile_BV, tokens.valid_BV)[1]
    row_BV, height_BV = _inside(tokens.row_BV, tile_BV)
    col_BV, width_BV = _inside(tokens.col_BV, tile_BV)
    return (tile_BV * rows + row_BV * rows // height_BV) * cols + col_BV * cols // width_BV


def _inside(place_BV: Tensor, tile_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Row or column counted from the first one of the tile, and how many the tile has."""
    low_BV = torch.zeros_like(tile_BV).scatter_reduce(1, tile_BV, place_BV, "amin", include_self=False)
    high_BV = torch.zeros_like(tile_BV).scatter_reduce(1, tile_BV, place_BV, "amax", include_self=False)
    low_BV, high_BV = low_BV.gather(1, tile_BV), high_BV.gather(1, tile_BV)
    return place_BV - low_BV, high_BV - low_BV + 1
