"""Idefics 3: square tiles in runs of their own, the overview last; one feature holds all tiles of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from transformers import Idefics3Config

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import END, IMAGE, START, tiny_text, tiny_vision

TILES = {"image": 3, "wide": 4}
"""Tiles of the tiny model's pictures, overview included."""

LIMITS = (
    "A budget holds for each tile of an image: text stands between tiles, and nothing says which are one image's.",
)


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """As many square tiles as the feature of each sample holds; a sample without images has none."""
    height, width = inputs["pixel_values"].shape[-2:]
    patch = config.vision_config.patch_size
    side = isqrt((height // patch) * (width // patch)) // config.scale_factor
    # Even nothing is a rectangle, so that its table of tokens has columns.
    return [Layout((Grid(side, side),) * (size // side**2) or (Grid(0, side),)) for size in sizes]


def tiny_config() -> Idefics3Config:
    """16 vision tokens per tile: 32 px, patches of 4, 2 x 2 of them per token."""
    vision = tiny_vision("idefics3_vision")
    return Idefics3Config(text_config=tiny_text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2)


def tiny_run(config: Any, kind: str) -> list[int]:
    """16 placeholders for each tile, each behind marks of its own."""
    tiles = range(TILES[kind])
    return [token for tile in tiles for token in (START, 105 + tile, *[IMAGE] * 16)] + [END]


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Tiles of every sample, filled up with tiles of zeros, and which of their pixels are real."""
    counts, side = [sum(TILES[kind] for kind in sample) for sample in samples], config.vision_config.image_size
    if not any(counts):
        return {}
    pixels = torch.zeros(len(samples), max(counts), 3, side, side)
    for row, count in zip(pixels, counts, strict=True):
        row[:count] = torch.randn(count, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(2).long()}


IDEFICS3 = Family(
    name="idefics3",
    model_types=("idefics3",),
    vision_tower="model.vision_model",
    projector="model.connector",
    language_model="model.text_model",
    layers="model.text_model.layers",
    image_layouts=image_layouts,
    splits_tiles=True,
    limits=LIMITS,
    tiny=Tiny(tiny_config, tiny_pixels, tiny_run, tuple(TILES)),
)
