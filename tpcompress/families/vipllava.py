"""ViP-LLaVA: as LLaVA, but the projector reads several concatenated layers of the tower."""

from __future__ import annotations

from typing import Any

from transformers import VipLlavaConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.llava import image_layouts
from tpcompress.families.tiny import IMAGE, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer, turns
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


def tiny_processor(config: Any) -> Any:
    """Images of 32 x 32 pixels; roles after hashes, as in Vicuna's first format."""
    from transformers import LlavaProcessor

    size = config.vision_config.image_size
    roles = {role: (f"###{name}: ", "") for role, name in (("user", "Human"), ("assistant", "Assistant"))}
    return LlavaProcessor(
        image_processor("CLIPImageProcessor", size={"shortest_edge": size}, crop_size=square_size(size)),
        tiny_tokenizer({0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>"}, {"image_token": "<image>"}, bos=True),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=turns({"system": ("", "")} | roles, "###Assistant:", "<image>\n"),
    )


# ------------------------------------------------------------------------------------------------------ family

VIPLLAVA = Family(
    name="vipllava",
    model_types=("vipllava",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=CLIP_LIKE,
    image_layouts=image_layouts,
    one_size=True,
    tiny=Tiny(tiny_config, fixed_pixels, run_of_64, processor=tiny_processor),
)
