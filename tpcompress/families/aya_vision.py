"""Aya Vision: square tiles, overview last, four patches per token; a text token before every tile."""

from __future__ import annotations

from typing import Any

from transformers import AyaVisionConfig

from tpcompress.families import internvl
from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.tiny import END, IMAGE, START, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import tiny_tokenizer, turns

# ------------------------------------------------------------------------------------------------ test fixture

TILE, OVERVIEW = 105, 106
"""Ids of the text tokens before a tile and before the last one."""


def tiny_config() -> AyaVisionConfig:
    """36 vision tokens per tile (24 px, patch 2), two of three decoder layers with a window of 48 tokens."""
    return AyaVisionConfig(
        text_config=tiny_cohere2(),
        vision_config=tiny_vision("siglip_vision_model", image_size=24, patch_size=2, vision_use_head=False),
        image_token_index=IMAGE,
    )


def tiny_cohere2() -> dict[str, Any]:
    """Config of a Cohere2 with sliding-window layers and full-attention layers, which have no positions."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return tiny_text("cohere2", sliding_window=48, layer_types=kinds)


def tiny_ids(config: Any, kind: str) -> list[int]:
    """The tiles of an image, each after its text token, between start and end."""
    tile = [IMAGE] * 36
    return [START, *[TILE, *tile] * (internvl.TILES[kind] - 1), OVERVIEW, *tile, END]


TURN_TOKENS = {
    0: "<PAD>", 1: "<BOS_TOKEN>", 2: "<|END_OF_TURN_TOKEN|>", 110: "<|START_OF_TURN_TOKEN|>", 111: "<|USER_TOKEN|>",
    112: "<|CHATBOT_TOKEN|>", 113: "<|SYSTEM_TOKEN|>",
}  # fmt: skip


def cohere_turns(image: str) -> str:
    """A template in the format of Command models, whose start token the tokenizer writes too."""
    names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}
    before = {role: f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>" for role, name in names.items()}
    roles = {role: (text, "<|END_OF_TURN_TOKEN|>") for role, text in before.items()}
    return turns(roles, before["assistant"], image, start="<BOS_TOKEN>")


def tiny_processor(config: Any) -> Any:
    """One to three tiles, each after its name in text; 6 x 6 tokens per tile."""
    from transformers import AyaVisionProcessor

    special = {
        IMAGE: "<|IMG_PATCH|>", START: "<|START_OF_IMG|>", END: "<|END_OF_IMG|>", TILE: "TILE", 106: "TILE_GLOBAL",
        107: "<image>",
    }  # fmt: skip
    vision = config.vision_config
    return AyaVisionProcessor(
        internvl.tile_processor(config),
        tiny_tokenizer(TURN_TOKENS | special, {}, bos=True),
        patch_size=vision.patch_size,
        img_size=vision.image_size,
        downsample_factor=config.downsample_factor,
        chat_template=cohere_turns("<image>"),
    )


# ------------------------------------------------------------------------------------------------------ family

AYA_VISION = Family(
    name="aya_vision",
    model_types=("aya_vision",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    image_layouts=internvl.image_layouts,
    tiles=Tiles(closes=True),
    tiny=Tiny(tiny_config, internvl.tiny_pixels, tiny_ids, ("image", "wide"), processor=tiny_processor),
)
