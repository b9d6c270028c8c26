"""Qwen2.5-VL: as Qwen2-VL, with windowed attention in the tower and absolute time of video frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from tpcompress.families import qwen2_vl
from tpcompress.families.base import Tiny
from tpcompress.families.qwen2_vl import (
    MROPE,
    QWEN2_VL,
    SIZES,
    tiny_ids,
    tiny_pixels,
    tiny_run,
    token_types,
)
from tpcompress.families.tiny import tiny_text
from tpcompress.families.towers import WINDOWED

# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config(sliding: bool = False) -> Qwen2_5_VLConfig:
    """64 tokens per image, tower windows of 4 x 4 patches; with `sliding`, odd layers see the last 48 tokens."""
    kinds = ["sliding_attention" if sliding and layer % 2 else "full_attention" for layer in range(6)]
    window = {"use_sliding_window": sliding, "sliding_window": 48, "layer_types": kinds}
    return Qwen2_5_VLConfig(
        text_config=tiny_text("qwen2_5_vl_text", rope_parameters=dict(MROPE), **window),
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [2],
        },
        **tiny_ids(),
    )  # fmt: skip


def timed_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """As for Qwen2-VL, with the seconds between video frames."""
    inputs = tiny_pixels(config, samples, generator)
    if "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), 0.5)
    return inputs


def tiny_processor(config: Any) -> Any:
    """As for Qwen2-VL, with the seconds between frames among the outputs."""
    return qwen2_vl.tiny_processor(config, "Qwen2_5_VLProcessor")


# ------------------------------------------------------------------------------------------------------ family

QWEN2_5_VL = replace(
    QWEN2_VL,
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    tower=WINDOWED,
    tiny=Tiny(tiny_config, timed_pixels, tiny_run, tuple(SIZES), token_types, ((), (True,)), tiny_processor),
)
