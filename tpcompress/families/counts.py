"""Vision tokens per image and patches per vision token, as far as the config of a model fixes them."""

from __future__ import annotations

from typing import Any

MERGE_SIDES = ("spatial_merge_size", "downsample_factor", "scale_factor", "pooling_kernel_size", "hidden_stride")
"""Config attributes with the side of the square of patches that becomes one vision token."""


def fixed_tokens(config: Any) -> int | None:
    """Vision tokens of an image in a model that resizes every image to one size; None if the config states no size."""
    side = getattr(config.vision_config, "image_size", None)
    if getattr(config, "mm_tokens_per_image", None) is not None:
        return int(config.mm_tokens_per_image)
    if not isinstance(side, int):
        return None
    with_class = getattr(
        config, "vision_feature_select_strategy", None
    ) == "full" and config.vision_config.model_type in ("clip_vision_model", "dinov2")
    return int((side // config.vision_config.patch_size) ** 2 + with_class)


def square_of_patches(config: Any) -> int | None:
    """Patches that the encoder or projector merges into one vision token, by the attributes that families share."""
    if hasattr(config, "mm_tokens_per_image"):
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return int(patches // config.mm_tokens_per_image)
    if hasattr(config, "downsample_ratio"):
        return round(1 / config.downsample_ratio**2)
    for name in MERGE_SIDES:
        side = getattr(config, name, None) or getattr(config.vision_config, name, None)
        if side is not None:
            return int(side) ** 2
    return 1


def unmerged(config: Any) -> int | None:
    """Every patch becomes one vision token."""
    return 1


def resampled(config: Any) -> int | None:
    """A resampler makes a fixed count of tokens, whatever the number of patches."""
    return None
