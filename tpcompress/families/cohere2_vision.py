"""Command A Vision: square tiles, overview last, four patches per token; a line break after every tile."""

from __future__ import annotations

from typing import Any

from transformers import Cohere2VisionConfig

from tpcompress.families import internvl
from tpcompress.families.aya_vision import TURN_TOKENS, cohere_turns, tiny_cohere2
from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.tiny import END, IMAGE, START, tiny_vision
from tpcompress.families.tiny_processor import square_size, tiny_tokenizer

# ------------------------------------------------------------------------------------------------ test fixture

BREAK = 105
"""Id of the line break after a tile."""


def tiny_config() -> Cohere2VisionConfig:
    """36 vision tokens per tile (24 px, patch 2)."""
    return Cohere2VisionConfig(
        text_config=tiny_cohere2(),
        vision_config=tiny_vision("siglip_vision_model", image_size=24, patch_size=2, vision_use_head=False),
        image_token_id=IMAGE,
        alignment_intermediate_size=128,
    )


def tiny_ids(config: Any, kind: str) -> list[int]:
    """The tiles of an image, each before its line break, between start and end."""
    return [START] + ([IMAGE] * 36 + [BREAK]) * internvl.TILES[kind] + [END]


def tiny_processor(config: Any) -> Any:
    """One to three tiles; the processor counts `patch_size` squared tokens per tile, whatever a patch is."""
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    names = {
        "image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }  # fmt: skip
    special = dict(zip((IMAGE, START, END, BREAK), names.values(), strict=True))
    sizes: dict[str, Any] = {"size": square_size(config.vision_config.image_size), "max_patches": 3, "patch_size": 6}
    return Cohere2VisionProcessor(
        Cohere2VisionImageProcessor(**sizes),
        tiny_tokenizer(TURN_TOKENS | special, names, bos=True),
        chat_template=cohere_turns("<|IMG_PATCH|>"),
    )


# ------------------------------------------------------------------------------------------------------ family

COHERE2_VISION = Family(
    name="cohere2_vision",
    model_types=("cohere2_vision",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    image_layouts=internvl.image_layouts,
    tiles=Tiles(gap=1),
    tiny=Tiny(tiny_config, internvl.tiny_pixels, tiny_ids, ("image", "wide"), processor=tiny_processor),
)
