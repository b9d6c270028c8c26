"""Retained vision tokens over the picture as the model saw it: cropped, cut into tiles, or whole.

A grid of vision tokens lies over a tile where the encoder got one tile of pixels for each grid; over the whole picture
where tiles were put together again without their padding, or where the encoder takes pictures of any size. What has no
place in the picture (tokens of a resampler, tiles of unknown origin) is drawn over an empty field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tpcompress.evaluation.figures.canvas import new_figure, save
from tpcompress.families.layout import Grid
from tpcompress.insertion.trace import StageTrace

SIDE = 480
"""Pixels of a panel's longer side, about: a whole number for each token."""
COLUMNS = 5
"""Panels beside each other, at most."""
EMPTY = 160
"""Grey level of a field without a picture."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One grid of vision tokens over what it was made of.

    Attributes:
        picture: uint8 (rows * n, cols * n, 3): every token has n x n pixels.
        keep: bool (rows, cols), tokens that are left.
        title: what stands above it.
    """

    picture: np.ndarray
    keep: np.ndarray
    title: str = ""

    @classmethod
    def of(cls, picture: Image.Image | None, keep: np.ndarray, title: str = "") -> Panel:
        """Stretch a picture to a grid, as the processor did; None is an empty field."""
        rows, cols = keep.shape
        size = max(4, SIDE // max(rows, cols))
        shape = (cols * size, rows * size)
        resized = Image.new("RGB", shape, (EMPTY,) * 3) if picture is None else picture.convert("RGB").resize(shape)
        return cls(np.asarray(resized), keep, title)

    def drawn(self) -> np.ndarray:
        """uint8, the picture with dropped tokens nearly white and without colour."""
        tall, wide = (pixels // tokens for pixels, tokens in zip(self.picture.shape, self.keep.shape, strict=False))
        keep = self.keep.repeat(tall, 0).repeat(wide, 1)[..., None]
        pale = 255 * 0.74 + 0.2 * self.picture.mean(-1, keepdims=True)
        return np.where(keep, self.picture, pale).round().astype(np.uint8)


def grids_of(stage: StageTrace) -> list[Grid]:
    """All rectangles of a stage, in the order of the sequence."""
    return [grid for layouts in stage.layouts for layout in layouts for grid in layout.grids]


def kept_grids(stage: StageTrace) -> list[np.ndarray]:
    """Which tokens are left after a stage, bool (rows, cols) for every rectangle."""
    kept = []
    for retained_V, layouts in zip(stage.retained_RV.cpu().numpy(), stage.layouts, strict=True):
        first = 0
        for grid in (grid for layout in layouts for grid in layout.grids):
            last = first + grid.rows * grid.cols
            kept.append(retained_V[first:last].reshape(grid.rows, grid.cols))
            first = last
    return kept


def pictures_of(
    image: Image.Image, inputs: Mapping[str, Any], grids: Sequence[Grid], settings: Any
) -> list[Image.Image | None]:
    """What lies under each grid: a tile as the tower sees it, the whole picture, or nothing known.

    Args:
        image: as it was given to the processor.
        inputs: what the processor made of it.
        grids: rectangles of vision tokens.
        settings: the image processor, whose normalisation is undone.
    """
    if any(grid.rows == 1 and grid.cols > 1 for grid in grids):
        return [None] * len(grids)  # listed, not laid out
    if any(grid.newline for grid in grids):
        return [image] * len(grids)  # overview, and tiles put together without their padding
    pixels = inputs.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.ndim >= 4 and pixels.shape[-3] == 3:
        tiles = pixels.reshape(-1, *pixels.shape[-3:])
        if len(tiles) == len(grids):
            return [_seen(tile, settings) for tile in tiles]
    return [image] if len(grids) == 1 else [None] * len(grids)


def stage_panels(stages: Sequence[StageTrace], names: Sequence[str], pictures: Sequence[Any]) -> list[list[Panel]]:
    """The panels of every stage.

    Args:
        stages: of one prefill.
        names: what each stage is called.
        pictures: what lies under each grid, as `pictures_of` gives it.
    """
    panels = []
    for stage, name in zip(stages, names, strict=True):
        row = []
        for number, (picture, keep) in enumerate(zip(pictures, kept_grids(stage), strict=True)):
            where = f" · part {number + 1}" if len(pictures) > 1 else ""
            unplaced = "\n(no place in the picture)" if picture is None else ""
            row.append(Panel.of(picture, keep, f"{name}{where}\n{keep.sum()} of {keep.size} tokens{unplaced}"))
        panels.append(row)
    return panels


def panels_figure(image: Image.Image, panels: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Write the picture and its panels; a stage of several panels has rows of its own.

    Args:
        image: drawn first, as it was given.
        panels: of every stage.
        path: an image file; its folder is made.
    """
    plain = Panel(np.asarray(image.convert("RGB")), np.ones((1, 1), bool), f"image\n{image.width} x {image.height}")
    flat = [plain, *[panel for row in panels for panel in row]]
    rows = [flat] if all(len(row) == 1 for row in panels) else [[plain], *panels]
    cells = [row[start : start + COLUMNS] for row in rows for start in range(0, len(row), COLUMNS)]
    cols = max(map(len, cells))
    figure, axes = new_figure(2.6 * cols, 2.9 * len(cells), len(cells), cols)
    for axis in axes.flat:
        axis.set_axis_off()
    for row_of_axes, listed in zip(axes, cells, strict=True):
        for axis, panel in zip(row_of_axes, listed, strict=False):
            axis.imshow(panel.drawn(), interpolation="nearest")
            axis.set_title(panel.title, fontsize=8)
    save(figure, path)


def _seen(tile: Tensor, settings: Any) -> Image.Image:
    """A tile (3, H, W) with its normalisation undone."""
    values = tile.float().cpu().numpy().transpose(1, 2, 0)
    if getattr(settings, "do_normalize", True):
        values = values * np.asarray(settings.image_std) + np.asarray(settings.image_mean)
    return Image.fromarray((255 * values.clip(0, 1)).round().astype(np.uint8))
