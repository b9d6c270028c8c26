"""Idefics 3: square tiles separated by text, overview last; one feature for all tiles of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from transformers import Idefics3Config

from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import END, IMAGE, START, VIDEO, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, tiny_tokenizer


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One square grid per tile of each sample; an empty grid for a sample without images."""
    height, width = inputs["pixel_values"].shape[-2:]
    patch = config.vision_config.patch_size
    side = isqrt((height // patch) * (width // patch)) // config.scale_factor
    # An empty grid instead of none, so that the table of tokens has columns.
    return [Layout((Grid(side, side),) * (size // side**2) or (Grid(0, side),)) for size in sizes]


# ------------------------------------------------------------------------------------------------ test fixture

TILES = {"image": 3, "wide": 4}
"""Number of tiles by kind, including the overview."""
OVERVIEW = 109
"""Id of the marker before the overview, which ends an image."""


def tiny_config() -> Idefics3Config:
    """16 vision tokens per tile: 32 px, patches of 4, 2 x 2 of them per token."""
    vision = tiny_vision("idefics3_vision")
    return Idefics3Config(text_config=tiny_text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2)


def tiny_run(config: Any, kind: str) -> list[int]:
    """16 placeholders for each tile, after two marker tokens; the second names the tile's place, or the overview."""
    markers = [*range(105, 104 + TILES[kind]), OVERVIEW]
    return [token for marker in markers for token in (START, marker, *[IMAGE] * 16)] + [END]


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Tiles of every sample, padded with tiles of zeros, and the mask of their pixels."""
    counts, side = [sum(TILES[kind] for kind in sample) for sample in samples], config.vision_config.image_size
    if not any(counts):
        return {}
    pixels = torch.zeros(len(samples), max(counts), 3, side, side)
    for row, count in zip(pixels, counts, strict=True):
        row[:count] = torch.randn(count, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(2).long()}


TOKENS = {
    0: "<|endoftext|>", 1: "<|im_start|>", 2: "<end_of_utterance>", IMAGE: "<image>", VIDEO: "<video>",
    START: "<fake_token_around_image>", 105: "<row_1_col_1>", 106: "<row_1_col_2>", 107: "<row_2_col_1>",
    108: "<row_2_col_2>", OVERVIEW: "<global-img>",
}  # fmt: skip

TEMPLATE = (
    "{{- '<|im_start|>' -}}"
    "{%- for message in messages -%}"
    "{{- message['role'] | capitalize + ':' -}}"
    "{%- if message['content'] is string -%}{{- ' ' + message['content'] -}}"
    "{%- else -%}"
    "{%- if message['content'] and message['content'][0]['type'] != 'image' -%}{{- ' ' -}}{%- endif -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<end_of_utterance>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
"""One start token, roles in words; the blank after a role depends on what follows it."""


def tile_sizes(config: Any) -> dict[str, dict[str, int]]:
    """Images are resized to two tiles on their longer edge."""
    side = config.vision_config.image_size
    return {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}


def tiny_processor(config: Any) -> Any:
    """Up to 2 x 2 tiles and an overview; every tile is named by a token for its row and column."""
    from transformers import Idefics3Processor

    return Idefics3Processor(
        image_processor("Idefics3ImageProcessor", **tile_sizes(config)),
        tiny_tokenizer(TOKENS, {}),
        image_seq_len=16,
        chat_template=TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------------ family

IDEFICS3 = Family(
    name="idefics3",
    model_types=("idefics3",),
    vision_tower="model.vision_model",
    projector="model.connector",
    language_model="model.text_model",
    layers="model.text_model.layers",
    image_layouts=image_layouts,
    tiles=Tiles(closes=True),
    splits_tiles=True,
    tiny=Tiny(tiny_config, tiny_pixels, tiny_run, tuple(TILES), processor=tiny_processor),
)
