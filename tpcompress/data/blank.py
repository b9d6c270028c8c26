"""Blank images of a row, for the blank baseline."""

from __future__ import annotations

from typing import Any

from PIL import Image

from tpcompress.data.rows import open_image

GREY = (127, 127, 127)


def blank_images(row: dict[str, Any]) -> dict[str, Any]:
    """The row with grey images of the same sizes.

    Raises:
        BadRow: an image is missing or corrupt.
    """
    images = [Image.new("RGB", open_image(image).size, GREY) for image in row["images"]]
    return {**row, "images": images}
