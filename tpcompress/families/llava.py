"""LLaVA 1.5 and its like: CLIP or SigLIP tower, two-layer projector, one fixed grid per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlavaConfig

from tpcompress.families.base import Family, ImageTokens

TOWERS = ("clip_vision_model", "siglip_vision_model")


def image_tokens(config: Any, inputs: Mapping[str, Any]) -> ImageTokens | None:
    """Every image has the same grid of patches; `full` selection adds CLIP's class token, and then there is no grid."""
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    patch = config.vision_config.patch_size
    if encoded is not None:
        counts = [len(features) for features in encoded.pooler_output]
        side = config.vision_config.image_size // patch
        grids = [(side, side)] if side * side == counts[0] else [(1, counts[0])]
        return ImageTokens(counts, grids * len(counts))
    pixels = inputs.get("pixel_values")
    if pixels is None or len(pixels) == 0:
        return None
    rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    extra = (strategy == "full") * has_class_token - (strategy == "default") * (not has_class_token)
    count = rows * cols + extra
    return ImageTokens([count] * len(pixels), [(1, count) if extra else (rows, cols)] * len(pixels))


def refuse(config: Any) -> str | None:
    """Variants whose vision tokens do not lie on one fixed grid, or whose layers see a window only."""
    tower = config.vision_config.model_type
    if tower not in TOWERS:
        return f"vision tower '{tower}' is not supported; supported: {', '.join(TOWERS)}."
    window = getattr(config.get_text_config(), "sliding_window", None)
    if window and getattr(config.get_text_config(), "use_sliding_window", True):
        return (
            f"its language model attends within a sliding window of {window}; set text_config.sliding_window to null."
        )
    return None


def tiny_config(tower: str = "clip_vision_model", layers: int = 6) -> LlavaConfig:
    """64 vision tokens per image (32 px, patch 4), a 3-layer tower and a `layers`-layer Llama of width 64."""
    vision = {
        "model_type": tower, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=100,
        image_seq_length=64,
        vision_feature_select_strategy="default" if tower == "clip_vision_model" else "full",
    )


LLAVA = Family(
    name="llava",
    model_types=("llava",),
    core="model",
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    language_model="model.language_model",
    layers="model.language_model.layers",
    placeholder="image_token_id",
    image_tokens=image_tokens,
    tiny_config=tiny_config,
    refuse=refuse,
)
