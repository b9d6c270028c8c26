"""Draw retained vision tokens over the images and frames of a prompt, as the vision tower receives them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tpcompress.evaluation.figures.canvas import dimmed, new_figure, save
from tpcompress.evaluation.figures.fields import Field
from tpcompress.evaluation.prompt import Media
from tpcompress.insertion.trace import StageTrace

SIDE = 480
"""Approximate pixels of the longer side of a panel; every token has a whole number of them."""
COLUMNS = 5
"""Maximum number of panels per row."""
WIDTH = 2.8
"""Inches of a panel."""
LETTERS = 36
"""Letters of a line of a title; longer lines are wrapped."""
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
        """uint8: the image with dropped tokens in grey."""
        tall, wide = (pixels // tokens for pixels, tokens in zip(self.pixels.shape, self.keep.shape, strict=False))
        keep = self.keep.repeat(tall, 0).repeat(wide, 1)[..., None]
        return np.where(keep, self.pixels, dimmed(self.pixels)).round().astype(np.uint8)


def media_panels(media: Media) -> list[Panel]:
    """The images of a prompt without tokens over them."""
    several = len(media.images) > 1
    return [
        Panel(
            np.asarray(image.convert("RGB")),
            np.ones((1, 1), bool),
            f"image{f' {number + 1}' if several else ''}\n{image.width} x {image.height}",
        )
        for number, image in enumerate(media.images)
    ]


def stage_panels(stages: Sequence[StageTrace], names: Sequence[str], fields: Sequence[Field]) -> list[list[Panel]]:
    """Create the panels of every stage.

    Args:
        stages: stages of one prefill.
        names: name of each stage.
        fields: fields of the prompt, from `fields_of`.
    """
    panels = []
    for stage, name in zip(stages, names, strict=True):
        row = []
        for each in fields:
            keep = each.kept(stage)
            lines = [name, each.title, f"{keep.sum()} of {keep.size} tokens"]
            lines += ["(no position in the image)"] if each.image is None else []
            row.append(Panel.of(each.image, keep, "\n".join(line for line in lines if line)))
        panels.append(row)
    return panels


def panels_figure(plain: Sequence[Panel], panels: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Draw the images and the panels; a stage with several panels starts a new row.

    Args:
        plain: panels of the images alone, drawn first.
        panels: panels of every stage.
        path: output image; its folder is created.
    """
    single = all(len(row) == 1 for row in panels) and len(plain) <= 1
    rows = [[*plain, *(panel for row in panels for panel in row)]] if single else [list(plain), *map(list, panels)]
    cells = [row[start : start + COLUMNS] for row in rows for start in range(0, len(row), COLUMNS)]
    cols = max(map(len, cells))
    heights = [max(WIDTH * panel.pixels.shape[0] / panel.pixels.shape[1] for panel in row) for row in cells]
    # Room for titles of up to five lines; a very high or flat image must not stretch the figure.
    heights = [min(max(height, 0.4), 2 * WIDTH) + 0.8 for height in heights]
    figure, axes = new_figure(WIDTH * cols, sum(heights), len(cells), cols, heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for row_of_axes, listed in zip(axes, cells, strict=True):
        for axis, panel in zip(row_of_axes, listed, strict=False):
            axis.imshow(panel.drawn(), interpolation="nearest")
            lines = [textwrap.fill(line, LETTERS) for line in panel.title.split("\n")]
            axis.set_title("\n".join(lines), fontsize=8)
    save(figure, path)
