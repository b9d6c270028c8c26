"""Images that lose detail and keep their size, so that a model of any family makes as many tokens of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image

from tpcompress.data.rows import open_image

FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BOX)
"""How an image is shrunk, by variant."""


def degrade(factor: float, variant: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that shrinks the images of a row by a factor and enlarges them again.

    Args:
        factor: of the sides.
        variant: 0 or 1: two ways of equal strength, by another filter and a grid shifted by half a step.
    """
    return partial(_row, factor=factor, variant=variant)


def _row(row: dict[str, Any], factor: float, variant: int) -> dict[str, Any]:
    return {**row, "images": [_degraded(open_image(image), factor, variant) for image in row["images"]]}


def _degraded(image: Image.Image, factor: float, variant: int) -> Image.Image:
    width, height = image.size
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    shift = variant * factor / 2 if min(width, height) > factor else 0.0
    box = (shift, shift, width, height)
    return image.resize(small, FILTERS[variant], box=box).resize(image.size, Image.Resampling.BICUBIC)
