"""Command A Vision: square tiles, overview last, four patches per token; a line break after every tile."""

from __future__ import annotations

from typing import Any

from transformers import Cohere2VisionConfig

from tpcompress.families import internvl
from tpcompress.families.aya_vision import TILES_APART, tiny_cohere2
from tpcompress.families.base import Family, Tiny
from tpcompress.families.tiny import END, IMAGE, START, tiny_vision

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


# ------------------------------------------------------------------------------------------------------ family

COHERE2_VISION = Family(
    name="cohere2_vision",
    model_types=("cohere2_vision",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    image_layouts=internvl.image_layouts,
    tiny=Tiny(tiny_config, internvl.tiny_pixels, tiny_ids, kinds=("image", "wide")),
    limits=(TILES_APART,),
)
