"""Draw retained vision tokens over the image as the vision tower receives it: cropped, in tiles, or whole.

A grid of vision tokens is drawn over its tile if the encoder got one tile of pixels per grid, and over the whole image
if tiles were merged without their padding or the encoder accepts images of any size. Tokens without a position in the
image (of a resampler, or of tiles of unknown origin) are drawn over an empty field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tpcompress.evaluation.figures.canvas import denormalized, new_figure, save
from tpcompress.families.layout import Grid
from tpcompress.insertion.trace import StageTrace

SIDE = 480
"""Approximate pixels of the longer side of a panel; every token has a whole number of them."""
COLUMNS = 5
"""Maximum number of panels per row."""
EMPTY = 160
"""Grey level of an empty field."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One grid of vision tokens over the image.

    Attributes:
        pixels: uint8 (rows * n, cols * n, 3): every token has n x n pixels.
        keep: bool (rows, cols): retained tokens.
        title: title of the panel.
    """

    pixels: np.ndarray
    keep: np.ndarray
    title: str = ""

    @classmethod
    def of(cls, image: Image.Image | None, keep: np.ndarray, title: str = "") -> Panel:
        """Resize an image to a grid, as the processor does; None gives an empty field."""
        rows, cols = keep.shape
        size = max(4, SIDE // max(rows, cols))
        shape = (cols * size, rows * size)
        resized = Image.new("RGB", shape, (EMPTY,) * 3) if image is None else image.convert("RGB").resize(shape)
        return cls(np.asarray(resized), keep, title)

    def drawn(self) -> np.ndarray:
        """uint8: the image with dropped tokens in a pale grey."""
        tall, wide = (pixels // tokens for pixels, tokens in zip(self.pixels.shape, self.keep.shape, strict=False))
        keep = self.keep.repeat(tall, 0).repeat(wide, 1)[..., None]
        pale = 255 * 0.74 + 0.2 * self.pixels.mean(-1, keepdims=True)
        return np.where(keep, self.pixels, pale).round().astype(np.uint8)


def grids_of(stage: StageTrace) -> list[Grid]:
    """All grids of a stage, in the order of the sequence."""
    return [grid for layouts in stage.layouts for layout in layouts for grid in layout.grids]


def kept_grids(stage: StageTrace) -> list[np.ndarray]:
    """Tokens retained after a stage: bool (rows, cols) for every grid."""
    kept = []
    for retained_V, layouts in zip(stage.retained_RV.cpu().numpy(), stage.layouts, strict=True):
        first = 0
        for grid in (grid for layout in layouts for grid in layout.grids):
            last = first + grid.rows * grid.cols
            kept.append(retained_V[first:last].reshape(grid.rows, grid.cols))
            first = last
    return kept


def background_images(
    image: Image.Image, inputs: Mapping[str, Any], grids: Sequence[Grid], image_processor: Any
) -> list[Image.Image | None]:
    """The image under each grid: a tile as the tower receives it, the whole image, or None if unknown.

    Args:
        image: input of the processor.
        inputs: outputs of the processor.
        grids: grids of vision tokens.
        image_processor: image processor, whose normalisation is undone.
    """
    if any(grid.rows == 1 and grid.cols > 1 for grid in grids):
        return [None] * len(grids)  # a list of tokens without positions
    if any(grid.newline for grid in grids):
        return [image] * len(grids)  # an overview, and tiles merged without their padding
    pixels = inputs.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.ndim >= 4 and pixels.shape[-3] == 3:
        tiles = pixels.reshape(-1, *pixels.shape[-3:])
        if len(tiles) == len(grids):
            return [_to_image(tile, image_processor) for tile in tiles]
    return [image] if len(grids) == 1 else [None] * len(grids)


def stage_panels(stages: Sequence[StageTrace], names: Sequence[str], images: Sequence[Any]) -> list[list[Panel]]:
    """Create the panels of every stage.

    Args:
        stages: stages of one prefill.
        names: name of each stage.
        images: image under each grid, from `background_images`.
    """
    panels = []
    for stage, name in zip(stages, names, strict=True):
        row = []
        for number, (image, keep) in enumerate(zip(images, kept_grids(stage), strict=True)):
            part = f" · part {number + 1}" if len(images) > 1 else ""
            unplaced = "\n(no position in the image)" if image is None else ""
            row.append(Panel.of(image, keep, f"{name}{part}\n{keep.sum()} of {keep.size} tokens{unplaced}"))
        panels.append(row)
    return panels


def panels_figure(image: Image.Image, panels: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Draw the image and the panels; a stage with several panels starts a new row.

    Args:
        image: input image, drawn first.
        panels: panels of every stage.
        path: output image; its folder is created.
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


def _to_image(tile: Tensor, image_processor: Any) -> Image.Image:
    """Convert a normalised tile (3, H, W) to an image."""
    return Image.fromarray((255 * denormalized(tile, image_processor)).round().astype(np.uint8))
