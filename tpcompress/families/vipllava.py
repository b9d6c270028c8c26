"""ViP-LLaVA: as LLaVA, but the projector reads several concatenated layers of the tower."""

from __future__ import annotations

from transformers import VipLlavaConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.llava import image_layouts
from tpcompress.families.tiny import IMAGE, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.towers import CLIP_LIKE

# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> VipLlavaConfig:
    """64 vision tokens per image from three layers of the tower."""
    return VipLlavaConfig(
        text_config=tiny_text(),
        vision_config=tiny_vision(),
        image_token_index=IMAGE,
        image_seq_length=64,
        vision_feature_layer=[-1, -2, 1],
    )


# ------------------------------------------------------------------------------------------------------ family

VIPLLAVA = Family(
    name="vipllava",
    model_types=("vipllava",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=CLIP_LIKE,
    image_layouts=image_layouts,
    tiny=Tiny(tiny_config, fixed_pixels, run_of_64),
)
