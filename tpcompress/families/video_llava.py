"""Video-LLaVA: one square grid per image; adjacent frames, each with the class token of the video tower first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import VideoLlavaConfig

from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.layout import Grid, Layout, square
from tpcompress.families.llava_next_video import ROLES, TOKENS
from tpcompress.families.tiny import IMAGE, VIDEO, fixed_pixels, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import square_size, tiny_tokenizer, turns


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One square grid per image, or one row that starts with the class token."""
    return square(sizes)


def video_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One row per frame, because it includes the class token."""
    return [Layout((Grid(1, size),), video=True) for size in sizes]


# ------------------------------------------------------------------------------------------------ test fixture

FRAMES = 3
"""Frames per video."""


def tiny_config() -> VideoLlavaConfig:
    """36 vision tokens per image, 37 per frame."""
    return VideoLlavaConfig(
        text_config=tiny_text(),
        vision_config=tiny_vision(image_size=24),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=36,
        video_seq_length=37 * FRAMES,
    )


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Images of one size, and videos (videos, frames, 3, size, size)."""
    inputs = fixed_pixels(config, [[kind for kind in kinds if kind == "image"] for kinds in samples], generator)
    videos, size = sum(kind == "video" for kinds in samples for kind in kinds), config.vision_config.image_size
    if videos:
        inputs["pixel_values_videos"] = torch.randn(videos, FRAMES, 3, size, size, generator=generator)
    return inputs


def tiny_ids(config: Any, kind: str) -> list[int]:
    """Placeholders of an image, or of all frames."""
    return [VIDEO] * 37 * FRAMES if kind == "video" else [IMAGE] * 36


def tiny_processor(config: Any) -> Any:
    """Images and frames of 24 x 24 pixels, every frame with a class token."""
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    side = config.vision_config.image_size
    sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square_size(side)}
    return VideoLlavaProcessor(
        VideoLlavaImageProcessor(**sizes),
        VideoLlavaVideoProcessor(**sizes),
        tiny_tokenizer(TOKENS, {"image_token": "<image>", "video_token": "<video>"}, bos=True),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=turns(ROLES, "ASSISTANT:", "<image>\n", "<video>\n"),
    )


# ------------------------------------------------------------------------------------------------------ family

VIDEO_LLAVA = Family(
    name="video_llava",
    model_types=("video_llava",),
    vision_tower="model.image_tower",
    projector="model.multi_modal_projector",
    image_layouts=image_layouts,
    one_size=True,
    video_layouts=video_layouts,
    tiles=Tiles(gap=0),
    tiny=Tiny(tiny_config, tiny_pixels, tiny_ids, kinds=("image", "video"), processor=tiny_processor),
    limits=(
        "Training vision_tower trains the image tower; the video tower is not trained.",
        "Videos that are not separated by text count as one, and so do images.",
    ),
)
