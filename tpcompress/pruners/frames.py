"""Frames of a video: the token of the same cell in the frame before, frames by number, and shares of a budget.

B rows, V tokens, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.topk import SAME, take


def cell_before(
    row_BV: Tensor, col_BV: Tensor, tile_BV: Tensor, image_BV: Tensor, valid_BV: Tensor, canvas: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The token of the same cell in the frame before.

    Rows count on from frame to frame. Frames of a video are equally high: with h rows each, a token of frame t lies in
    a row below (t + 1) h, so the largest row // (t + 1) is h - 1. That holds after an earlier stage, too, as long as
    some frame has a token of its last row left; of several videos in a row, each but the first must still have
    one of its very first row.

    Args:
        row_BV: canvas row of each token, int64 (B, V).
        col_BV: its column.
        tile_BV: its frame, counted in the row of the batch.
        image_BV: its video, counted in the row of the batch.
        valid_BV: bool (B, V).
        canvas: (rows, columns) that hold every row of the batch.

    Returns:
        int64 (B, V), the index of that token, and bool (B, V): whether there is one. Tokens of one cell must follow
        each other in the order of their frames, as in a sequence.
    """
    B, V = row_BV.shape
    images = max(canvas[0], V)  # every image has a row of its own on the canvas
    image_BV = image_BV.masked_fill(~valid_BV, images)
    none_BI = row_BV.new_full((B, images + 1), torch.iinfo(torch.long).max)
    none_BI[:, 0] = 0  # the first video starts at row 0, whatever was dropped of it
    row_BV, tile_BV = (
        x_BV - none_BI.scatter_reduce(1, image_BV, x_BV, "amin").gather(1, image_BV) for x_BV in (row_BV, tile_BV)
    )
    last_BI = torch.zeros_like(none_BI).scatter_reduce(1, image_BV, row_BV // (tile_BV + 1), "amax")
    height_BV = last_BI.gather(1, image_BV) + 1
    cell_BV = (image_BV * canvas[0] + row_BV - tile_BV * height_BV) * canvas[1] + col_BV
    order_BV = cell_BV.masked_fill(~valid_BV, torch.iinfo(torch.long).max).argsort(dim=1, stable=True)
    previous_BV = order_BV.roll(1, dims=1)
    same_BV = (cell_BV.gather(1, order_BV) == cell_BV.gather(1, previous_BV)) & valid_BV.gather(1, order_BV)
    same_BV &= tile_BV.gather(1, order_BV) == tile_BV.gather(1, previous_BV) + 1
    before_BV = torch.empty_like(order_BV).scatter(1, order_BV, previous_BV)
    return before_BV, torch.zeros_like(valid_BV).scatter(1, order_BV, same_BV)


def cell_change(x_BVD: Tensor, before_BV: Tensor) -> Tensor:
    """1 - cosine of each token to the one before it, fp32 (B, V); exactly 0 for a token that did not change.

    Args:
        x_BVD: features.
        before_BV: index of the token to compare with.
    """
    x_BVD = F.normalize(x_BVD.float(), dim=-1)
    similar_BV = (x_BVD * take(x_BVD, before_BV)).sum(-1)
    return 1 - similar_BV.masked_fill(similar_BV > 1 - SAME, 1.0)


def frame_mean(x_BVC: Tensor, frame_BV: Tensor, valid_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each frame, fp32 (B, V, C), added up in fp64, and its number of tokens, int64 (B, V).

    Args:
        x_BVC: values of the tokens.
        frame_BV: number of each token's frame, from 0 without gaps; a row has at most V frames.
        valid_BV: bool (B, V).

    Returns:
        Frame t of a row at index t; 0 where a row has no such frame.
    """
    real_BVC = x_BVC.double().masked_fill(~valid_BV[..., None], 0.0)
    index_BVC = frame_BV[..., None].expand_as(real_BVC)
    size_BV = torch.zeros_like(frame_BV).scatter_add(1, frame_BV, valid_BV.long())
    sum_BVC = torch.zeros_like(real_BVC).scatter_add(1, index_BVC, real_BVC)
    return (sum_BVC / size_BV.clamp(min=1)[..., None]).float(), size_BV
