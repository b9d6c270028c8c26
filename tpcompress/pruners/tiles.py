"""Images that a model gets as an overview and a mosaic of crops: which token is of which crop, and where it lies.

LLaVA-NeXT's layout: the first rectangle of a row is the overview, the second the merged crops, cut to the image. That
and only that is seen in a row of two rectangles; the places of tiles that stay rectangles of their own are not known.

B rows, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.combinators import place_inside


@dataclass(frozen=True)
class Mosaic:
    """The parts of each row.

    Attributes:
        overview_BV: bool, tokens of an overview; none in a row without one.
        crop_BV: int64, number of the crop from 1 to V, for a token of the overview the one that lies under it, and in
            a row of another kind the number of its rectangle; 0 on padding.
        tiled_B1: bool, whether a row has an overview and crops.
        high_BV, wide_BV: fp32, where a token lies in the grid of the overview: rows and columns of its centre.
    """

    overview_BV: Tensor
    crop_BV: Tensor
    tiled_B1: Tensor
    high_BV: Tensor
    wide_BV: Tensor

    @property
    def part_BV(self) -> Tensor:
        """int64: the crop of each token, 0 for the overview."""
        return self.crop_BV.masked_fill(self.overview_BV, 0)


def mosaic(tokens: TokenView) -> Mosaic:
    """The overview and crops of each row.

    A crop is as large as the overview in tokens. The mosaic is cut alike at opposite sides, as the padding was.
    """
    valid_BV = tokens.valid_BV
    column_BV = torch.arange(valid_BV.shape[1], device=valid_BV.device).expand_as(valid_BV)
    number_BV = place_inside(column_BV, tokens.tile_BV, valid_BV)[1].masked_fill(~valid_BV, 0)
    tiled_B1 = number_BV.amax(1, keepdim=True) == 1
    over_BV = valid_BV & tiled_B1 & (number_BV == 0)
    (row_BV, tall_B1, rows_B1), (col_BV, broad_B1, cols_B1) = (
        _axis(place_BV, over_BV, valid_BV) for place_BV in (tokens.row_BV, tokens.col_BV)
    )
    across_B1, numbers = -(-cols_B1 // broad_B1), []
    for place_BV, size_B1, count_B1 in ((row_BV, tall_B1, rows_B1), (col_BV, broad_B1, cols_B1)):
        cut_B1 = -count_B1 % size_B1  # of the last crops
        # Twice the place in the mosaic, so that the middle of a token of the overview is a whole number of halves.
        under_BV = ((2 * place_BV + 1) * count_B1 // (2 * size_B1)).minimum(count_B1 - 1)
        numbers.append((torch.where(over_BV, under_BV, place_BV) + cut_B1 // 2) // size_B1)
    crop_BV = torch.where(tiled_B1, numbers[0] * across_B1 + numbers[1], number_BV) + 1
    scaled = [
        torch.where(over_BV, place_BV.float(), (place_BV + 0.5) * size_B1 / count_B1 - 0.5)
        for place_BV, size_B1, count_B1 in ((row_BV, tall_B1, rows_B1), (col_BV, broad_B1, cols_B1))
    ]
    return Mosaic(over_BV, crop_BV.masked_fill(~valid_BV, 0), tiled_B1, scaled[0], scaled[1])


def _axis(place_BV: Tensor, over_BV: Tensor, valid_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows or columns counted from the first one of a token's rectangle, and how many overview and mosaic have."""
    largest = torch.iinfo(torch.long).max
    starts, counts = [], []
    for inside_BV in (over_BV, valid_BV & ~over_BV):
        low_B1 = place_BV.masked_fill(~inside_BV, largest).amin(1, keepdim=True)
        high_B1 = place_BV.masked_fill(~inside_BV, -1).amax(1, keepdim=True)
        starts.append(low_B1.masked_fill(high_B1 < 0, 0))
        counts.append((high_B1 - starts[-1] + 1).clamp(min=1))
    from_BV = (place_BV - torch.where(over_BV, starts[0], starts[1])).masked_fill(~valid_BV, 0)
    return from_BV, counts[0], counts[1]


def from_overview(x_BV: Tensor, parts: Mosaic, canvas: tuple[int, int]) -> Tensor:
    """Values of an overview's tokens at the places of all tokens of the row, bilinear between their centres.

    Args:
        x_BV: fp32; those of the overview are read. A token that an earlier stage dropped counts as 0.
        parts: of the rows.
        canvas: (rows, columns) of the smallest grid that holds every row of the batch.
    """
    rows, cols = canvas
    over_BV = parts.overview_BV
    cell_BV = (parts.high_BV * cols + parts.wide_BV).long().masked_fill(~over_BV, rows * cols)
    grid_BP = x_BV.new_zeros(len(x_BV), rows * cols + 1).scatter(1, cell_BV, x_BV)
    ends = [
        place_BV.masked_fill(~over_BV, -1).amax(1, keepdim=True).clamp(min=0)
        for place_BV in (parts.high_BV, parts.wide_BV)
    ]
    high_BV, wide_BV = (
        place_BV.clamp(min=0).minimum(end_B1)
        for place_BV, end_B1 in zip((parts.high_BV, parts.wide_BV), ends, strict=True)
    )
    found_BV = torch.zeros_like(x_BV)
    for down in (0, 1):
        for right in (0, 1):
            at_BV, to_BV = high_BV.floor() + down, wide_BV.floor() + right
            share_BV = (1 - (high_BV - at_BV).abs()) * (1 - (wide_BV - to_BV).abs())
            index_BV = (at_BV.minimum(ends[0]) * cols + to_BV.minimum(ends[1])).long()
            found_BV += share_BV * grid_BP.gather(1, index_BV)
    return found_BV


def sum_of_parts(x_BV: Tensor, part_BV: Tensor) -> Tensor:
    """The sum of x over each token's part, fp32 (B, V), added up in fp64.

    Args:
        x_BV: values, 0 on what does not count.
        part_BV: int64 from 0 to V.
    """
    total_BP = x_BV.new_zeros(len(x_BV), x_BV.shape[1] + 1, dtype=torch.float64)
    return total_BP.scatter_add(1, part_BV, x_BV.double()).gather(1, part_BV).float()
