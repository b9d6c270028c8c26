"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; pooled video frames in sequence, without newlines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlavaNextVideoConfig

from tpcompress.families import llava_next
from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import IMAGE, VIDEO, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer, turns
from tpcompress.families.towers import POOLING


def video_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One square grid per frame; pooling omits a last row and column that do not fill a stride."""
    side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
    frames = inputs["pixel_values_videos"].shape[1]
    return [Layout((Grid(side, side),) * frames, video=True)] * len(sizes)


# ------------------------------------------------------------------------------------------------ test fixture

FRAMES = 10
"""Frames per video."""


def tiny_config() -> LlavaNextVideoConfig:
    """Tiles of 4 x 4 vision tokens, frames of 2 x 2."""
    return LlavaNextVideoConfig(
        text_config=tiny_text(),
        vision_config=tiny_vision(image_size=16),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=llava_next.PINPOINTS,
    )


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Tiles of the images as in LLaVA-NeXT, frames of the videos (videos, frames, 3, size, size)."""
    inputs = llava_next.tiny_pixels(config, samples, generator)
    videos, size = sum(kind == "video" for kinds in samples for kind in kinds), config.vision_config.image_size
    if videos:
        inputs["pixel_values_videos"] = torch.randn(videos, FRAMES, 3, size, size, generator=generator)
    return inputs


def tiny_ids(config: Any, kind: str) -> list[int]:
    """Placeholders of an image, or of the frames of a video."""
    return [VIDEO] * 4 * FRAMES if kind == "video" else llava_next.tiny_ids(config, kind)


ROLES = {"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT: ", "</s>")}

TOKENS = {0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>", VIDEO: "<video>"}


def tiny_processor(config: Any) -> Any:
    """Tiles and frames of 16 x 16 pixels."""
    from transformers import LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    side = config.vision_config.image_size
    sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square_size(side)}
    return LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**sizes),
        image_processor("LlavaNextImageProcessor", **sizes, image_grid_pinpoints=config.image_grid_pinpoints),
        tiny_tokenizer(TOKENS, {"image_token": "<image>", "video_token": "<video>"}, bos=True),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=turns(ROLES, "ASSISTANT:", "<image>\n", "<video>\n"),
    )


# ------------------------------------------------------------------------------------------------------ family

LLAVA_NEXT_VIDEO = Family(
    name="llava_next_video",
    model_types=("llava_next_video",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=POOLING,
    image_layouts=llava_next.image_layouts,
    video_layouts=video_layouts,
    tiny=Tiny(tiny_config, tiny_pixels, tiny_ids, ("image", "wide", "video"), processor=tiny_processor),
)
