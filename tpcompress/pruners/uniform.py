"""Uniform: retain one token in the middle of each of k equal cells of the image grid (arXiv 2502.11501, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import central, grid_cells


class Uniform(Pruner):
    """keep = the token nearest to the centre of each cell; cells as in `grid_cells`, exactly k for any k.

    needs  nothing.     gives  keep_BV, scores_BV = 1 on kept tokens, else 0.
    Cost: a few sums over V.
    """

    name = "uniform"
    group = "reference"
    paper_plan = """
    # The uniform grid: the central token of each of 64 equal cells of LLaVA-1.5's 24 x 24.
    stages:
      - {pruner: uniform, keep_tokens: 64}
    """

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        cell_BV = grid_cells(tokens.row_BV, tokens.col_BV, tokens.valid_BV, num_keep_B)
        keep_BV = central(cell_BV, tokens.row_BV, tokens.col_BV, tokens.valid_BV)
        return Selection(keep_BV, keep_BV.to(torch.float32))
