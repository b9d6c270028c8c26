"""GLM-4.1V, GLM-4.5V and GLM-4.6V: positions as in Qwen2-VL; video frames are formatted like images in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4vConfig, Glm4vMoeConfig, Glm46VConfig, PretrainedConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.qwen2_vl import SIZES, image_layouts, patch_processors, tiny_pixels, video_layouts
from tpcompress.families.qwen3_vl import ROUTER_LOSS
from tpcompress.families.tiny import END, IMAGE, START, VIDEO, tiny_text
from tpcompress.families.tiny_processor import tiny_tokenizer, turns

EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip

KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "glm4v": (Glm4vConfig, "glm4v_text", {}),
    "glm4v_moe": (Glm4vMoeConfig, "glm4v_moe_text", EXPERTS),
    "glm46v": (Glm46VConfig, "glm4v_text", {}),
}


# ------------------------------------------------------------------------------------------------ test fixture

VIDEO_START, VIDEO_END, TIMESTAMP = 105, 106, 107

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}


def tiny_config(model_type: str = "glm4v", media: str = "images") -> PretrainedConfig:
    """64 tokens per image, half of a head rotated. With `media="videos"` every input is a video.

    The models cannot distinguish images from videos in one batch, so videos require a separate config.
    """
    make, text_type, experts = KINDS[model_type]
    config: PretrainedConfig = make(
        text_config=tiny_text(text_type, rope_parameters=dict(ROPE), **experts),
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "image_size": 32,
            "out_hidden_size": 64,
        },
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END, tiny_media=media,
    )  # fmt: skip
    return config


def images_or_videos(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Patches and grids of images, or of videos with one frame for `image` and two for `wide`."""
    inputs = tiny_pixels(config, samples, generator)
    if config.tiny_media == "images" or not inputs:
        return inputs
    grids = inputs["image_grid_thw"]
    grids[:, 0] = torch.tensor([1 + (kind == "wide") for kinds in samples for kind in kinds])
    width, count = inputs["pixel_values"].shape[1], int(grids.prod(-1).sum())
    return {"pixel_values_videos": torch.randn(count, width, generator=generator), "video_grid_thw": grids}


def frames_run(config: Any, kind: str) -> list[int]:
    """An image between start and end; for a video one such run per frame, each before a timestamp."""
    _, rows, cols = SIZES[kind]
    frame = [START] + [IMAGE] * (rows * cols // config.vision_config.spatial_merge_size**2) + [END]
    if config.tiny_media == "images":
        return frame
    return [VIDEO_START] + (frame + [TIMESTAMP]) * (1 + (kind == "wide")) + [VIDEO_END]


def token_types(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """1 on images, 2 on frames of videos: the model computes positions from these types."""
    starts = (input_ids == config.video_start_token_id).cumsum(1)
    ends = (input_ids == config.video_end_token_id).cumsum(1)
    return {"mm_token_type_ids": (input_ids == config.image_token_id) * (1 + (starts > ends).long())}


NAMES = {"image_token": "<|image|>", "video_token": "<|video|>"}

TOKENS = {
    0: "<|endoftext|>", 1: "[gMASK]", 2: "<|user|>", IMAGE: "<|image|>", VIDEO: "<|video|>",
    START: "<|begin_of_image|>", END: "<|end_of_image|>", VIDEO_START: "<|begin_of_video|>",
    VIDEO_END: "<|end_of_video|>", 108: "<sop>", 109: "<|assistant|>", 110: "<|system|>",
}  # fmt: skip


def tiny_processor(config: Any) -> Any:
    """16 to 64 tokens per image; no token ends an answer but the start of the next turn."""
    import transformers

    name = "Glm46V" if config.model_type == "glm46v" else "Glm4v"
    roles = {role: (f"<|{role}|>\n", "") for role in ("system", "user", "assistant")}
    return getattr(transformers, f"{name}Processor")(
        **patch_processors(
            config, f"{name}ImageProcessor", getattr(transformers, f"{name}VideoProcessor"), frames=4
        ),
        tokenizer=tiny_tokenizer(TOKENS, NAMES),
        chat_template=turns(
            roles, "<|assistant|>\n", "<|begin_of_image|><|image|><|end_of_image|>",
            "<|begin_of_video|><|video|><|end_of_video|>", start="[gMASK]<sop>",
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ family

GLM4V = Family(
    name="glm4v",
    model_types=tuple(KINDS),
    vision_tower="model.visual",
    projector="model.visual.merger",
    image_layouts=image_layouts,
    video_token="image_token_id",
    video_layouts=video_layouts,
    positions="mrope",
    limits=(
        "Images and videos cannot be mixed in one batch: transformers uses the same placeholder for both.",
        ROUTER_LOSS,
    ),
    tiny=Tiny(
        tiny_config, images_or_videos, frames_run, ("image", "wide"), token_types,
        variants=(*((kind,) for kind in KINDS), ("glm4v", "videos")), processor=tiny_processor,
    ),
)  # fmt: skip
