"""The test fixture of a family (`Tiny`), and building blocks of several: configs, pixels and ids of random models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

IMAGE, VIDEO, START, END, NEWLINE = 100, 101, 102, 103, 104
"""Special ids of tiny models; text tokens have ids 3 to 89."""


def no_arguments(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """There are no further model inputs."""
    return {}


@dataclass(frozen=True)
class Tiny:
    """Test fixture of a family: a random model of a few thousand parameters, and inputs for it.

    The contract tests of all families build it. It is part of the family's file, so that adding a family is one file.

    Attributes:
        config: (arguments of a variant) -> config with six decoder layers (or as few as the family allows), vocabulary
            128 and width 64; text tokens have ids 3 to 89.
        pixels: (config, kinds of media per sample, generator) -> image and video inputs by name, as from the processor.
        ids: (config, kind) -> ids of one image or video in the prompt, including separators.
        kinds: kinds of media: always `image`; `wide`, an image of another size, and `video` if supported.
        arguments: (config, input ids (B, S)) -> further inputs that the processor derives from the ids.
        variants: arguments of `config` for each variant that all tests cover.
        processor: (config) -> the processor of a variant: the real class with tiny sizes.
        saved: arguments of `config` for a model that is saved with its processor; the first variant without it.
    """

    config: Callable[..., PretrainedConfig]
    pixels: Callable[[Any, Sequence[Sequence[str]], Any], dict[str, Any]]
    ids: Callable[[Any, str], list[int]]
    kinds: tuple[str, ...] = ("image",)
    arguments: Callable[[Any, Tensor], dict[str, Tensor]] = no_arguments
    variants: tuple[tuple[Any, ...], ...] = ((),)
    processor: Callable[[Any], Any] | None = None
    saved: tuple[Any, ...] | None = None


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
