"""Gemma 3: one square grid of pooled tokens per image with bidirectional attention; most layers are sliding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3Config

from tpcompress.families.base import Blocks, Family, Tiny
from tpcompress.families.layout import Layout, square
from tpcompress.families.tiny import END, IMAGE, START, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.towers import AVERAGING


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """Patches are averaged to a square grid; crops of pan and scan are separate images."""
    return square(sizes)


def number_runs(vision: Tensor) -> Tensor:
    """Number the runs of True in each row.

    Args:
        vision: bool (B, S).

    Returns:
        int64 (B, S): 0, 1, ... for each run, -1 elsewhere.
    """
    starts = vision.clone()
    starts[:, 1:] &= ~vision[:, :-1]
    return torch.where(vision, starts.cumsum(1) - 1, -1)


def image_blocks(config: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Every run of image tokens is a block."""
    types = arguments.get("token_type_ids")
    return None if types is None else number_runs(types == 1)


def refuse(config: Any) -> str | None:
    """Refuse encoders that are built from a decoder."""
    if config.get_text_config().use_bidirectional_attention:
        return "its text attention is bidirectional; use_bidirectional_attention=False is supported."
    return None


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> Gemma3Config:
    """64 vision tokens per image (16 x 16 patches); window 48, full attention in layers 1 and 4."""
    text = tiny_text("gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=48)
    text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"] * 2
    return Gemma3Config(
        text_config=text,
        vision_config=tiny_vision("siglip_vision_model", patch_size=2, vision_use_head=False),
        mm_tokens_per_image=64,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def tiny_run(config: Any, kind: str) -> list[int]:
    """64 placeholders between start and end."""
    return [START, *run_of_64(config, kind), END]


def token_types(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """1 on image tokens."""
    return {"token_type_ids": (input_ids == IMAGE).long()}


# ------------------------------------------------------------------------------------------------------ family

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=AVERAGING,
    image_layouts=image_layouts,
    masks_in_core=True,
    blocks=Blocks(image_blocks),
    refuse=refuse,
    tiny=Tiny(tiny_config, fixed_pixels, tiny_run, arguments=token_types),
)
