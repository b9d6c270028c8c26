"""Qwen3-VL, dense and MoE: timestamps between video frames, features added to early decoder layers (DeepStack)."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.qwen2_vl import (
    MARKS,
    NAMES,
    SIZES,
    TOKENS,
    image_layouts,
    patch_processors,
    tiny_ids,
    tiny_pixels,
    token_types,
    video_layouts,
)
from tpcompress.families.tiny import END, IMAGE, START, VIDEO, tiny_text
from tpcompress.families.tiny_processor import chatml, tiny_tokenizer
from tpcompress.families.towers import MERGING

ROUTER_LOSS = "The load balancing loss of MoE models requires all tokens in every layer: disable output_router_logits."


# ------------------------------------------------------------------------------------------------ test fixture

INTERLEAVED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

TIMESTAMP = 105
"""Id of the timestamp before every frame."""


def tiny_config(moe: bool = False) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """64 tokens per image, three DeepStack layers; with `moe`, two of four experts per token."""
    kind, make = ("qwen3_vl_moe_text", Qwen3VLMoeConfig) if moe else ("qwen3_vl_text", Qwen3VLConfig)
    return make(
        text_config=tiny_text(kind, head_dim=16, rope_parameters=dict(INTERLEAVED), **(EXPERTS if moe else {})),
        vision_config=tiny_tower(deepstack_visual_indexes=[0, 1, 2]),
        **tiny_ids(),
    )


def tiny_tower(**more: Any) -> dict[str, Any]:
    """Config of a three-layer tower of width 32 with 4 x 4 patches and a 16 x 16 grid of learned positions."""
    return {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
        "num_position_embeddings": 256,
    } | more  # fmt: skip


def stamped_run(config: Any, kind: str) -> list[int]:
    """Placeholders between start and end; for a video one such run per frame, each after a timestamp."""
    frames, rows, cols = SIZES[kind]
    count = rows * cols // config.vision_config.spatial_merge_size**2
    if kind == "video":
        return ([TIMESTAMP, START] + [VIDEO] * count + [END]) * frames
    return [START] + [IMAGE] * count + [END]


def tiny_processor(config: Any) -> Any:
    """ChatML without a default system prompt; the time of every frame is part of its text."""
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        **patch_processors(config, videos=Qwen3VLVideoProcessor, frames=4),
        tokenizer=tiny_tokenizer(TOKENS, NAMES),
        chat_template=chatml(*MARKS),
    )


# ------------------------------------------------------------------------------------------------------ family

QWEN3_VL = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    vision_tower="model.visual",
    projector="model.visual.merger",
    tower=MERGING,
    image_layouts=image_layouts,
    video_layouts=video_layouts,
    positions="mrope",
    limits=(ROUTER_LOSS,),
    tiny=Tiny(tiny_config, tiny_pixels, stamped_run, tuple(SIZES), token_types, ((), (True,)), tiny_processor),
)
