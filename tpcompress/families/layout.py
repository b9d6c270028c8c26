"""How the placeholders of one image or video lie: rectangles of vision tokens, and tokens that only separate them.

All of it is known to the host before the language model runs, from the shapes and sizes that the encoder gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One rectangle of vision tokens: a whole image, a tile of it, or a frame of a video.

    Attributes:
        rows, cols: its size in tokens; 1 x count where tokens are no grid.
        newline: a separator ends every row (LLaVA-NeXT's image newline). Separators are never dropped.
    """

    rows: int
    cols: int
    newline: bool = False


@dataclass(frozen=True)
class Layout:
    """The placeholders of one image or one video, in the order of the sequence.

    Attributes:
        grids: its rectangles: one, or the tiles of an image (overview first where the model puts it first), or the
            frames of a video.
        tail: separators after the last rectangle.
        video: the rectangles are frames.
    """

    grids: tuple[Grid, ...]
    tail: int = 0
    video: bool = False

    @property
    def count(self) -> int:
        """Vision tokens, which a stage may drop."""
        return sum(grid.rows * grid.cols for grid in self.grids)

    @property
    def placeholders(self) -> int:
        """Positions in the sequence: vision tokens and separators."""
        return self.count + sum(grid.rows for grid in self.grids if grid.newline) + self.tail

    @property
    def canvas(self) -> tuple[int, int]:
        """(rows, columns) of the rectangles standing on top of each other."""
        return sum(grid.rows for grid in self.grids), max(grid.cols for grid in self.grids)

    @cached_property
    def table(self) -> Tensor:
        """int64 (count, 4): placeholder, canvas row, column and rectangle of every vision token."""
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
    """One rectangle and nothing else."""
    return Layout((Grid(rows, cols),))


def square(sizes: Sequence[int]) -> list[Layout]:
    """Images of so many tokens each, on square grids where that fits, else on one row."""
    sides = [(round(size**0.5), size) for size in sizes]
    return [plain(side, side) if side * side == size else plain(1, size) for side, size in sides]
