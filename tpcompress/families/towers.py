"""Mappings from the patches of a vision tower to vision tokens, shared by several families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from tpcompress.families.base import Tower

WITH_CLASS = ("clip_vision_model", "dinov2")
"""Towers whose first token is a class token."""


def class_first(config: Any) -> bool:
    """CLIP and DINOv2 have a class token before the patches, SigLIP has none."""
    return config.vision_config.model_type in WITH_CLASS


def no_class(config: Any) -> bool:
    """There is no class token."""
    return False


def always_class(config: Any) -> bool:
    """There is always a class token."""
    return True


def class_kept(config: Any) -> str | None:
    """Refuse configs whose vision tokens include the class token, which is not a patch."""
    whole = getattr(config, "vision_feature_select_strategy", None) == "full"
    if whole and config.vision_config.model_type != "siglip_vision_model":
        return "with vision_feature_select_strategy 'full' the class token is a vision token"
    return None


def one_each(core: Any, modality: str, inputs: Mapping[str, Any], x_TPC: Tensor) -> list[Tensor]:
    """One token per patch."""
    return list(x_TPC)


def packed_tiles(core: Any, modality: str, inputs: Mapping[str, Any], x_TPC: Tensor) -> list[Tensor]:
    """LLaVA-NeXT: overview and tiles packed by the model's own function; frames pooled by the model's own layer."""
    if modality == "video":
        return list(core.vision_resampler(x_TPC).unflatten(0, inputs["pixel_values_videos"].shape[:2]).flatten(1, 2))
    config, sizes = core.config, inputs["image_sizes"]
    counts = [tiles_of(config, size) for size in sizes]
    newline_C = x_TPC.new_zeros(x_TPC.shape[-1])
    return core.pack_image_features(x_TPC.split(counts), sizes, "default", image_newline=newline_C)[0]


def image_tiles(core: Any, modality: str, inputs: Mapping[str, Any], x_TPC: Tensor) -> list[Tensor]:
    """The same for the projector's input: tiles of images; frames are already pooled and have no rows per patch."""
    return packed_tiles(core, modality, inputs, x_TPC) if modality == "image" else []


def tiles_of(config: Any, image_size: Any) -> int:
    """Number of tiles of an image (height, width), including the overview."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    count: int = image_size_to_num_patches(image_size, config.image_grid_pinpoints, config.vision_config.image_size)
    return count


def shrunk_tiles(core: Any, modality: str, inputs: Mapping[str, Any], x_TPC: Tensor) -> list[Tensor]:
    """LLaVA-OneVision: tiles and frames, interpolated and packed by the model's own functions."""
    config, newline_C = core.config, x_TPC.new_zeros(x_TPC.shape[-1])
    if modality == "video":
        videos = core.apply_pooling(x_TPC).unflatten(0, inputs["pixel_values_videos"].shape[:2]).flatten(1, 2)
        return [torch.cat([x_NC, newline_C[None]]) for x_NC in videos]
    sizes, per_sample = inputs["image_sizes"], inputs.get("batch_num_images")
    alone = [True] * len(sizes)
    if per_sample is not None:
        alone = [int(count) == 1 for count in per_sample for _ in range(int(count))]
    counts = [tiles_of(config, size) if only else 1 for size, only in zip(sizes, alone, strict=True)]
    aspect = inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio
    return core.pack_image_features(x_TPC.split(counts), sizes, newline_C, aspect)[0]


def shuffled_patches(core: Any, modality: str, inputs: Mapping[str, Any], x_TPC: Tensor) -> list[Tensor]:
    """InternVL: mean over the square of patches that the model's own pixel shuffle concatenates to one token."""
    T, P, C = x_TPC.shape
    side = round(P**0.5)
    x_TYXC = x_TPC.contiguous().view(T, side, side, C)
    shuffled = core.pixel_shuffle(x_TYXC, scale_factor=core.config.downsample_ratio)
    return list(shuffled.flatten(1, 2).unflatten(2, (-1, C)).mean(2))


def pooled_patches(core: Any, modality: str, inputs: Mapping[str, Any], x_TPC: Tensor) -> list[Tensor]:
    """Gemma 3: squares of patches, averaged by the model's own pooling."""
    side = round(x_TPC.shape[1] ** 0.5)
    pooled = core.multi_modal_projector.avg_pool(x_TPC.mT.unflatten(2, (side, side)))
    return list(pooled.flatten(2).mT)


def merged_patches(core: Any, modality: str, inputs: Mapping[str, Any], x_1PC: Tensor) -> list[Tensor]:
    """Qwen: mean over the square of consecutive patches that is merged to one token."""
    merge = core.config.vision_config.spatial_merge_size
    x_MC = x_1PC[0].unflatten(0, (-1, merge**2)).mean(1)
    return list(x_MC.split((inputs[f"{modality}_grid_thw"].prod(-1) // merge**2).tolist()))


def merged_pixels(core: Any, modality: str, inputs: Mapping[str, Any], x_1PC: Tensor) -> list[Tensor]:
    """All pixels of the merged patches of a token: image by image, in each image channel by channel."""
    vision = core.config.vision_config
    merge, images = vision.spatial_merge_size, images_per_token(core.config)
    x_MPC = x_1PC[0].unflatten(0, (-1, merge**2))
    x_MPcix = x_MPC.unflatten(2, (-1, images, vision.patch_size**2))
    x_MC = x_MPcix.permute(0, 3, 2, 1, 4).flatten(1)
    return list(x_MC.split((inputs[f"{modality}_grid_thw"].prod(-1) // merge**2).tolist()))


def images_per_token(config: Any) -> int:
    """Consecutive images that a patch of Qwen's towers holds."""
    count: int = config.vision_config.temporal_patch_size
    return count


def merged_windows(core: Any, modality: str, inputs: Mapping[str, Any], x_1PC: Tensor) -> list[Tensor]:
    """The same for patches in the order of their attention windows."""
    vision, grid = core.config.vision_config, inputs[f"{modality}_grid_thw"]
    merge = vision.spatial_merge_size
    order_M, _ = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
    x_MPC = x_1PC[0].unflatten(0, (-1, merge**2))
    back_M = order_M.argsort().to(x_1PC.device)
    return merged_patches(core, modality, inputs, x_MPC[back_M].flatten(0, 1)[None])


def average_pool(config: Any) -> str | None:
    """Refuse pooling modes of videos other than the mean."""
    if config.spatial_pool_mode != "average":
        return f"spatial_pool_mode '{config.spatial_pool_mode}' of its videos is not a mean over patches"
    return class_kept(config)


CLIP_LIKE = Tower("encoder.layers", "self_attn", one_each, class_first, class_kept, projected=one_each)
"""CLIP or SigLIP with one vision token per patch."""

DINO = Tower("encoder.layer", "attention", one_each, class_first, class_kept, projected=one_each)
"""DINOv2 with one vision token per patch."""

TILED = Tower("encoder.layers", "self_attn", packed_tiles, class_first, class_kept, projected=image_tiles)
"""CLIP or SigLIP on the tiles of LLaVA-NeXT."""

SHRINKING = Tower("encoder.layers", "self_attn", shrunk_tiles, class_first, class_kept)
"""LLaVA-OneVision."""

SHUFFLING = Tower("encoder.layer", "attention", shuffled_patches, always_class, class_kept, projected=one_each)
"""InternVL."""

AVERAGING = Tower("encoder.layers", "self_attn", pooled_patches, no_class)
"""SigLIP in Gemma 3."""

POOLING = replace(TILED, refuse=average_pool)
"""LLaVA-NeXT-Video."""

MERGING = Tower("blocks", "attn", merged_patches, no_class, pixels=merged_pixels, images=images_per_token)
"""Qwen2-VL and Qwen3-VL."""

WINDOWED = replace(MERGING, to_tokens=merged_windows)
"""Qwen2.5-VL."""
