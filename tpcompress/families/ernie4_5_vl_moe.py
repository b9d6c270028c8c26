"""ERNIE 4.5 VL: separate experts for vision tokens; the projector merges pairs of video frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Ernie4_5_VLMoeConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Layout
from tpcompress.families.qwen2_vl import SIZES, image_layouts, merged_grids, tiny_run, token_types
from tpcompress.families.qwen3_vl import ROUTER_LOSS
from tpcompress.families.tiny import END, IMAGE, START, VIDEO, tiny_text
from tpcompress.families.tiny_processor import image_processor, tiny_tokenizer, turns


def video_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One grid per `temporal_merge_size` frames, from `video_grid_thw`."""
    frames = inputs["video_grid_thw"].new_tensor([config.vision_config.temporal_merge_size, 1, 1])
    return merged_grids(config, inputs["video_grid_thw"] // frames, sizes, video=True)


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> Ernie4_5_VLMoeConfig:
    """64 tokens per image; two of four experts per token and modality, except in the first layer."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 16], "moe_num_shared_experts": 1}
    return Ernie4_5_VLMoeConfig(
        text_config=tiny_text("ernie4_5_vl_moe_text", rope_parameters=rope, **experts),
        vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=START, video_end_token_id=END,
    )  # fmt: skip


def paired_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Flat patches and grids of all images, and of all videos, which have two frames per grid of tokens."""
    vision = config.vision_config
    width = vision.in_channels * vision.patch_size**2
    inputs: dict[str, Any] = {}
    for pixels, grid, video in (("pixel_values", "image", False), ("pixel_values_videos", "video", True)):
        shapes = [SIZES[kind] for kinds in samples for kind in kinds if (kind == "video") == video]
        if shapes:
            grids = torch.tensor(shapes)
            grids[:, 0] *= vision.temporal_merge_size if video else 1
            inputs[pixels] = torch.randn(int(grids.prod(-1).sum()), width, generator=generator)
            inputs[f"{grid}_grid_thw"] = grids
    return inputs


def expert_types(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """Token types, and a second version that includes start and end tokens and selects the experts."""
    types = token_types(config, input_ids)["mm_token_type_ids"]
    ends = (input_ids == config.image_start_token_id) | (input_ids == config.image_end_token_id)
    return {"mm_token_type_ids": types, "moe_mm_token_type_ids": types + ends}


MARKS = ("<|IMAGE_START|>", "<|IMAGE_END|>")


def tiny_processor(config: Any) -> Any:
    """As for Qwen2-VL, without the time that the real video processor draws on frames, which needs a font."""
    from transformers import Ernie4_5_VLMoeProcessor, Ernie4_5_VLMoeVideoProcessor

    vision, token = (
        config.vision_config,
        (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2,
    )
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    size = {"shortest_edge": 16 * token, "longest_edge": 64 * token}
    names = {
        "image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
        "image_start_token": MARKS[0], "image_end_token": MARKS[1], "video_start_token": MARKS[0],
        "video_end_token": MARKS[1],
    }  # fmt: skip
    special = {0: "<unk_pad>", 1: "<s>", 2: "</s>", IMAGE: names["image_token"], VIDEO: names["video_token"]}
    roles = {"system": ("", "\n"), "user": ("User: ", "\n"), "assistant": ("Assistant: ", "</s>")}
    return Ernie4_5_VLMoeProcessor(
        image_processor("Ernie4_5_VLMoeImageProcessor", **sizes, size=size),
        tiny_tokenizer(special | {START: MARKS[0], END: MARKS[1]}, names),
        Ernie4_5_VLMoeVideoProcessor(**sizes, size=size, min_frames=2, draw_on_frames=False),
        chat_template=turns(
            roles, "Assistant: ", names["image_token"].join(MARKS), names["video_token"].join(MARKS), start="<s>"
        ),
    )


# ------------------------------------------------------------------------------------------------------ family

ERNIE4_5_VL_MOE = Family(
    name="ernie4_5_vl_moe",
    model_types=("ernie4_5_vl_moe",),
    vision_tower="model.vision_tower",
    projector="model.resampler_model",
    image_layouts=image_layouts,
    video_layouts=video_layouts,
    positions="mrope",
    limits=(ROUTER_LOSS,),
    tiny=Tiny(tiny_config, paired_pixels, tiny_run, tuple(SIZES), expert_types, processor=tiny_processor),
)
