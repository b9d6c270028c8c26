"""Idefics 2: a resampler returns a fixed number of tokens per image, without a grid; one feature per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Idefics2Config

from tpcompress.families.base import Tiny
from tpcompress.families.counts import resampled
from tpcompress.families.idefics3 import IDEFICS3, TEMPLATE
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import IMAGE, START, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, tiny_tokenizer


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One grid per image of each sample; an empty grid for a sample without images."""
    count = config.perceiver_config.resampler_n_latents
    # An empty grid instead of none, so that the table of tokens has columns.
    return [Layout((Grid(1, count),) * (size // count) or (Grid(0, count),)) for size in sizes]


# ------------------------------------------------------------------------------------------------ test fixture

SIZES = {"image": (32, 32), "wide": (20, 44)}
"""Height and width in pixels by kind."""


def tiny_config(window: int | None = None) -> Idefics2Config:
    """40 vision tokens per image; with a `window`, every decoder layer is sliding."""
    return Idefics2Config(
        text_config=tiny_text("mistral", head_dim=16, sliding_window=window),
        vision_config=tiny_vision("idefics2_vision", image_size=48),
        perceiver_config={
            "hidden_size": 64, "resampler_n_latents": 40, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 16, "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )  # fmt: skip


def tiny_run(config: Any, kind: str) -> list[int]:
    """Placeholders between two equal marker tokens."""
    return [START, *[IMAGE] * config.perceiver_config.resampler_n_latents, START]


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Images of every sample, padded to the same number and size, and the mask of their pixels."""
    sizes = [[SIZES[kind] for kind in sample] for sample in samples]
    flat = [size for sample in sizes for size in sample]
    if not flat:
        return {}
    height, width = max(h for h, _ in flat), max(w for _, w in flat)
    pixels = torch.zeros(len(samples), max(map(len, sizes)), 3, height, width)
    for row, sample in zip(pixels, sizes, strict=True):
        for image, (h, w) in zip(row, sample, strict=False):
            image[:, :h, :w] = torch.randn(3, h, w, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(2).long()}


def tiny_processor(config: Any) -> Any:
    """Whole images of 20 to 48 pixels; no token starts a conversation."""
    from transformers import Idefics2Processor

    names = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    special = {0: "<unk_pad>", 1: "<s>", 2: "<end_of_utterance>"}
    return Idefics2Processor(
        image_processor("Idefics2ImageProcessor", size={"shortest_edge": 20, "longest_edge": 48}),
        tiny_tokenizer(special | {IMAGE: "<image>", START: "<fake_token_around_image>"}, names, bos=True),
        image_seq_len=config.perceiver_config.resampler_n_latents,
        chat_template=TEMPLATE.replace("{{- '<|im_start|>' -}}", ""),
    )


# ------------------------------------------------------------------------------------------------------ family

IDEFICS2 = replace(
    IDEFICS3,
    name="idefics2",
    model_types=("idefics2",),
    image_layouts=image_layouts,
    tiles=None,
    limits=("With do_image_splitting each of the five crops of an image counts as an image.",),
    patches_per_token=resampled,
    tiny=Tiny(tiny_config, tiny_pixels, tiny_run, tuple(SIZES), variants=((), (48,)), processor=tiny_processor),
)
