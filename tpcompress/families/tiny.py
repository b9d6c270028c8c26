"""Building blocks of the test fixtures (`Tiny`) of several families: configs, pixels and ids of tiny random models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IMAGE, VIDEO, START, END, NEWLINE = 100, 101, 102, 103, 104
"""Special ids of tiny models; text tokens have ids 3 to 89."""


def tiny_text(model_type: str = "llama", **more: Any) -> dict[str, Any]:
    """Config of a six-layer language model of width 64 with grouped-query attention."""
    return {
        "model_type": model_type, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    } | more  # fmt: skip


def tiny_vision(model_type: str = "clip_vision_model", **more: Any) -> dict[str, Any]:
    """Config of a three-layer tower of width 32 that splits 32 x 32 pixels into 8 x 8 patches."""
    return {
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
    } | more  # fmt: skip


def fixed_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """`pixel_values` (images, 3, size, size) of images of one size."""
    count, size = sum(map(len, samples)), config.vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(count, 3, height, width, generator=generator)} if count else {}


def run_of_64(config: Any, kind: str) -> list[int]:
    """64 placeholders."""
    return [IMAGE] * 64
