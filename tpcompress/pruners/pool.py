"""Pool: average the vision tokens of each of k equal cells of the image grid (arXiv 2502.11501, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import cell_weights, central, grid_cells


class Pool(Pruner):
    """x'(c) = mean of x over cell c, placed at the position of the cell's central token.

    needs  nothing.     gives  keep_BV, scores_BV (1 on kept), vision_BVD with the means at the kept tokens.
    Exact for any count: cells differ by at most one token per side (`grid_cells`), so k need not be a square and the
    kernel need not divide the grid. Sums in fp32.
    """

    name = "pool"
    merges = True

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        cell_BV = grid_cells(tokens.row_BV, tokens.col_BV, tokens.valid_BV, num_keep_B)
        weight_BKV = cell_weights(cell_BV, tokens.valid_BV, num_keep_B)
        keep_BV = central(cell_BV, tokens.row_BV, tokens.col_BV, tokens.valid_BV)
        mean_BKD = weight_BKV.float() @ tokens.vision_BVD.float().masked_fill(~tokens.valid_BV[..., None], 0.0)
        # Every token reads its own cell's mean; only the kept ones survive, so no scatter is needed.
        index_BVD = cell_BV.masked_fill(~tokens.valid_BV, 0)[..., None].expand_as(tokens.vision_BVD)
        merged_BVD = mean_BKD.gather(1, index_BVD).to(tokens.vision_BVD.dtype)
        vision_BVD = torch.where(keep_BV[..., None], merged_BVD, tokens.vision_BVD)
        return Selection(keep_BV, keep_BV.to(torch.float32), vision_BVD=vision_BVD)
