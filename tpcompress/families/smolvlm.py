"""SmolVLM 1 and 2: tiles as in Idefics 3; video frames are images."""

from __future__ import annotations

from dataclasses import replace

from transformers import SmolVLMConfig

from tpcompress.families.base import Tiny
from tpcompress.families.idefics3 import IDEFICS3, TILES, tiny_pixels, tiny_run
from tpcompress.families.tiny import IMAGE, tiny_text, tiny_vision

# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> SmolVLMConfig:
    """16 vision tokens per tile: 32 px, patches of 4, 2 x 2 of them per token."""
    vision = tiny_vision("smolvlm_vision")
    return SmolVLMConfig(text_config=tiny_text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2)


# ------------------------------------------------------------------------------------------------------ family

SMOLVLM = replace(
    IDEFICS3,
    name="smolvlm",
    model_types=("smolvlm",),
    tiny=Tiny(tiny_config, tiny_pixels, tiny_run, tuple(TILES)),
)
