"""Layout of the placeholders of one image or video: grids of vision tokens, and separator tokens between them.

Layouts are computed on the host before the language model runs, from the shapes and sizes of the encoder's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One grid of vision tokens: a whole image, a tile of it, or a frame of a video.

    Attributes:
        rows, cols: size in tokens; 1 x count if the tokens have no 2-d positions.
        newline: every row ends with a separator (LLaVA-NeXT's image newline). Separators are never dropped.
    """

    rows: int
    cols: int
    newline: bool = False


@dataclass(frozen=True)
class Layout:
    """The placeholders of one image or one video, in the order of the sequence.

    Attributes:
        grids: one grid, or the tiles of an image (in the order of the model), or the frames of a video.
        tail: number of separators after the last grid.
        video: the grids are frames.
    """

    grids: tuple[Grid, ...]
    tail: int = 0
    video: bool = False

    @property
    def count(self) -> int:
        """Number of vision tokens, which a stage can drop."""
        return sum(grid.rows * grid.cols for grid in self.grids)

    @property
    def placeholders(self) -> int:
        """Number of positions in the sequence: vision tokens and separators."""
        return self.count + sum(grid.rows for grid in self.grids if grid.newline) + self.tail

    @property
    def canvas(self) -> tuple[int, int]:
        """(rows, columns) of all grids stacked vertically."""
        return sum(grid.rows for grid in self.grids), max(grid.cols for grid in self.grids)

    @property
    def pieces(self) -> tuple[Layout, ...]:
        """One layout per grid; separators after the last grid stay with it."""
        last = len(self.grids) - 1
        return tuple(Layout((grid,), self.tail if i == last else 0, self.video) for i, grid in enumerate(self.grids))

    @cached_property
    def table(self) -> Tensor:
        """int64 (count, 4): placeholder index, canvas row, canvas column and grid index of every token."""
        parts, place, top = [], 0, 0
        for number, grid in enumerate(self.grids):
            step = grid.cols + grid.newline
            row = torch.arange(grid.rows)[:, None].expand(grid.rows, grid.cols)
            col = torch.arange(grid.cols).expand(grid.rows, grid.cols)
            parts.append(torch.stack([place + row * step + col, top + row, col, torch.full_like(row, number)], -1))
            place, top = place + grid.rows * step, top + grid.rows
        return torch.cat([part.reshape(-1, 4) for part in parts])


@cache
def plain(rows: int, cols: int) -> Layout:
    """A layout of a single grid without separators."""
    return Layout((Grid(rows, cols),))


def square(sizes: Sequence[int]) -> list[Layout]:
    """Layouts of images with the given token counts: square grids if possible, else one row."""
    sides = [(round(size**0.5), size) for size in sizes]
    return [plain(side, side) if side * side == size else plain(1, size) for side, size in sides]
