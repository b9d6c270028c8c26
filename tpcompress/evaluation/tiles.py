"""Fewer tiles: the setting of an image processor that splits images, at which no image has more than some tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from PIL import Image

from tpcompress.families import Parts

SHAPES = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 3), (3, 4))
"""Aspect ratios at which the tiles of a setting are counted."""
SIDE = 480
"""Pixels of the short side of a sample, times the factor above."""


class CannotDownsample(ValueError):
    """The images of a model cannot be made smaller; `str()` says why."""


def fewer_tiles(parts: Parts, processor: Any, keep_tokens: int) -> Any | None:
    """The image processor with the most tiles at which no image has more than `keep_tokens` vision tokens.

    Args:
        parts: parts of the model.
        processor: its processor.
        keep_tokens: vision tokens per image.

    Returns:
        None for a processor that does not split images, or not in a way that can be set.

    Raises:
        CannotDownsample: one tile has more tokens than that.
    """
    least = None
    for image_processor in _settings(processor.image_processor):
        least = _most_tokens(parts, processor, image_processor)
        if least <= keep_tokens:
            return image_processor
    if least is not None:
        raise CannotDownsample(f"images of {parts.family.name} cannot be downsampled: one tile is {least} tokens.")
    return None


def _settings(plain: Any) -> Iterator[Any]:
    """Image processors with ever fewer tiles, from what the plain one does to a single tile."""
    if getattr(plain, "crop_to_patches", None) is not None and hasattr(plain, "max_patches"):  # InternVL, GOT-OCR2
        for number in range(plain.max_patches if plain.crop_to_patches else 1, 0, -1):
            changed = copy.copy(plain)
            changed.crop_to_patches, changed.max_patches = number > 1, number
            changed.min_patches = min(getattr(plain, "min_patches", 1), number)
            yield changed
    elif getattr(plain, "do_image_splitting", None) is not None and hasattr(
        plain, "max_image_size"
    ):  # Idefics3, SmolVLM
        side, largest = plain.max_image_size["longest_edge"], plain.size["longest_edge"]
        for edge in range(largest if plain.do_image_splitting else side, 0, -side):
            changed = copy.copy(plain)
            changed.do_image_splitting, changed.size = edge > side, {"longest_edge": max(edge, side)}
            yield changed


def _most_tokens(parts: Parts, processor: Any, image_processor: Any) -> int:
    """Vision tokens of the sample that has the most."""
    changed = copy.copy(processor)
    changed.image_processor = image_processor
    samples = [Image.new("RGB", (SIDE * w, SIDE * h), (127, 127, 127)) for w, h in SHAPES]
    counts = []
    for sample in samples:
        ids = changed(text=[changed.image_token], images=[sample], return_tensors="pt")["input_ids"]
        counts.append(int((ids == parts.placeholder_ids["image"]).sum()))
    return max(counts)
