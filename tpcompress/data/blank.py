"""Blank images of a row: for the blank baseline, and where a batch needs an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

BLANK = "blank"  # key of rows whose media the collator replaces by blank ones
GREY = 128  # no processor maps it to exact zeros, which SmolVLM takes for padding and leaves out


def blank_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, for a collator, with grey images, and frames of videos, of the same sizes in place of its own.

    They are replaced before the processor, which therefore splits and pads them as it does the row's own. Those that
    are missing or corrupt make the row bad as without it.

    Args:
        row: a row.
    """
    return {**row, BLANK: True}


def blank_image(size: tuple[int, int]) -> Image.Image:
    """A grey image of (width, height)."""
    return Image.new("RGB", size, (GREY, GREY, GREY))
