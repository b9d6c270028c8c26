"""PaddleOCR-VL: images of any size, no videos; a separate projector merges 2 x 2 patches; positions as in Qwen2-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PaddleOCRVLConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.qwen2_vl import MROPE, SIZES, image_layouts, tiny_ids, tiny_run, token_types
from tpcompress.families.tiny import END, IMAGE, START, tiny_text
from tpcompress.families.tiny_processor import image_processor, tiny_tokenizer, turns

# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> PaddleOCRVLConfig:
    """64 tokens per image, a three-layer tower of width 32 with 4 x 4 patches."""
    return PaddleOCRVLConfig(
        text_config=tiny_text("paddleocr_vl_text", head_dim=16, rope_parameters=dict(MROPE)),
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 4,
        },
        **tiny_ids(),
    )  # fmt: skip


def square_patches(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Patches (patches, 3, size, size) and grids of all images."""
    shapes = [SIZES[kind] for kinds in samples for kind in kinds]
    if not shapes:
        return {}
    grids, side = torch.tensor(shapes), config.vision_config.patch_size
    pixels = torch.randn(int(grids.prod(-1).sum()), 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def tiny_processor(config: Any) -> Any:
    """16 to 64 tokens per image."""
    from transformers import PaddleOCRVLProcessor

    special = {0: "<unk_pad>", 1: "<s>", 2: "</s>", IMAGE: "<|IMAGE|>", START: "<|IMAGE_START|>", END: "<|IMAGE_END|>"}
    roles = {"system": ("", "\n"), "user": ("User: ", "\n"), "assistant": ("Assistant: ", "</s>")}
    vision, token = (
        config.vision_config,
        (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2,
    )
    images = image_processor(
        "PaddleOCRVLImageProcessor", patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
        size={"shortest_edge": 16 * token, "longest_edge": 64 * token},
    )  # fmt: skip
    return PaddleOCRVLProcessor(
        images,
        tiny_tokenizer(special, {"image_token": "<|IMAGE|>"}),
        chat_template=turns(roles, "Assistant: ", "<|IMAGE_START|><|IMAGE|><|IMAGE_END|>", start="<s>"),
    )


# ------------------------------------------------------------------------------------------------------ family

PADDLEOCR_VL = Family(
    name="paddleocr_vl",
    model_types=("paddleocr_vl",),
    vision_tower="model.visual",
    projector="model.projector",
    image_layouts=image_layouts,
    positions="mrope",
    tiny=Tiny(tiny_config, square_patches, tiny_run, ("image", "wide"), token_types, processor=tiny_processor),
)
