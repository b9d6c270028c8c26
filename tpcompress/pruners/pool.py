"""Pool: one token for each of k equal cells of the image grid, most often their mean (arXiv 2502.11501, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import cell_weights, central, grid_cells

KERNELS = ("mean", "gaussian", "max", "central")


class Pool(Pruner):
    """x'(c) = kernel of x over cell c, placed at the position of the cell's central token.

        mean        the average
        gaussian    the average with weights exp(-d^2 / 2 s^2), d the distance to the middle of the cell and s^2 the
                    mean of d^2 in it, so that the kernel grows with the cell
        max         the largest value of each channel
        central     the central token itself: nothing is merged, as in `uniform`

    needs  nothing.     gives  keep_BV, scores_BV (1 on kept), vision_BVD with the new values at the kept tokens.
    Exact for any count: cells differ by at most one token per side (`grid_cells`), so k need not be a square and the
    kernel need not divide the grid. Sums in fp32. At full budget every cell is one token, which stays as it is.
    Paper: average pooling; the size of its kernel is not published.
    Cost: one product of k cells with V tokens; none with `central`.
    Unlike the official code: none was found, so the cells, the other kernels and the position are ours.
    """

    name = "pool"
    paper = "2502.11501"
    group = "reference"
    paper_plan = """
    # Pooling (arXiv 2502.11501): 64 of 576 tokens before the language model, each the mean of 3 x 3.
    stages:
      - {pruner: pool, layer: 0, keep_tokens: 64}
    """
    test_arguments = (
        {"kernel": "max"},
        {"kernel": "gaussian"},
        {"kernel": "central"},
    )

    def __init__(self, kernel: str = "mean") -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"pool has no kernel '{kernel}'; choose one of {', '.join(KERNELS)}.")
        self.kernel = kernel
        self.merges = kernel != "central"

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        cell_BV = grid_cells(tokens.row_BV, tokens.col_BV, tokens.valid_BV, num_keep_B)
        keep_BV = central(cell_BV, tokens.row_BV, tokens.col_BV, tokens.valid_BV)
        if self.kernel == "central":
            return Selection(keep_BV, keep_BV.to(torch.float32))
        index_BVD = cell_BV.masked_fill(~tokens.valid_BV, 0)[..., None].expand_as(tokens.vision_BVD)
        if self.kernel == "max":
            cells_BKD = cell_maxima(tokens.vision_BVD, cell_BV, tokens.valid_BV, num_keep_B)
        else:
            weight_BKV = cell_weights(cell_BV, tokens.valid_BV, num_keep_B).float()
            if self.kernel == "gaussian":
                weight_BKV = towards_the_middle(weight_BKV, tokens.row_BV, tokens.col_BV)
            cells_BKD = weight_BKV @ tokens.vision_BVD.float().masked_fill(~tokens.valid_BV[..., None], 0.0)
        # Every token reads its own cell's value; only the kept ones survive, so no scatter is needed.
        merged_BVD = cells_BKD.gather(1, index_BVD).to(tokens.vision_BVD.dtype)
        vision_BVD = torch.where(keep_BV[..., None], merged_BVD, tokens.vision_BVD)
        return Selection(keep_BV, keep_BV.to(torch.float32), vision_BVD=vision_BVD)


def towards_the_middle(weight_BKV: Tensor, row_BV: Tensor, col_BV: Tensor) -> Tensor:
    """Averaging weights times exp(-d^2 / 2 s^2), adding up to 1 again.

    Args:
        weight_BKV: weights of a plain average, adding up to 1 in each cell (B, K, V); d is the distance to their centre
            and s^2 their mean of d^2.
        row_BV: row of each token.
        col_BV: column of each token.
    """
    far_BKV = torch.zeros_like(weight_BKV)
    for place_BV in (row_BV, col_BV):
        place_B1V = place_BV[:, None].to(weight_BKV.dtype)
        far_BKV = far_BKV + (place_B1V - (weight_BKV * place_B1V).sum(-1, keepdim=True)).square()
    # A cell of one token has no spread: its only distance is 0, whatever it is divided by.
    spread_BK1 = (weight_BKV * far_BKV).sum(-1, keepdim=True).clamp(min=1e-6)
    weight_BKV = weight_BKV * (-far_BKV / (2 * spread_BK1)).exp()
    return weight_BKV / weight_BKV.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def cell_maxima(x_BVD: Tensor, cell_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """The largest value of each channel in each cell (B, K, D), K the largest count; 0 in cells that do not exist."""
    B, _, D = x_BVD.shape
    K = int(num_keep_B.max())
    cell_BV = cell_BV.masked_fill(~valid_BV, K)  # padding has a cell of its own after the others
    empty_BKD = x_BVD.new_zeros(B, K + 1, D)
    return empty_BKD.scatter_reduce(1, cell_BV[..., None].expand_as(x_BVD), x_BVD, "amax", include_self=False)[:, :K]
