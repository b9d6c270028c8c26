"""SmolVLM 1 and 2: tiles as in Idefics 3; video frames are images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import SmolVLMConfig

from tpcompress.families.base import Tiny
from tpcompress.families.idefics3 import IDEFICS3, TEMPLATE, TILES, TOKENS, tile_sizes, tiny_pixels, tiny_run
from tpcompress.families.tiny import IMAGE, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, tiny_tokenizer

# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> SmolVLMConfig:
    """16 vision tokens per tile: 32 px, patches of 4, 2 x 2 of them per token."""
    vision = tiny_vision("smolvlm_vision")
    return SmolVLMConfig(text_config=tiny_text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2)


def tiny_processor(config: Any) -> Any:
    """As for Idefics 3; frames of a video are images of one tile, each after its time."""
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor

    video: dict[str, Any] = {"max_image_size": {"longest_edge": 32}}
    video["video_sampling"] = {"max_frames": 4, "fps": 1, "video_size": {"longest_edge": 32}}
    return SmolVLMProcessor(
        image_processor("SmolVLMImageProcessor", **tile_sizes(config)),
        tiny_tokenizer(TOKENS, {}),
        SmolVLMVideoProcessor(**video),
        image_seq_len=16,
        chat_template=TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------------ family

SMOLVLM = replace(
    IDEFICS3,
    name="smolvlm",
    model_types=("smolvlm",),
    packages=("num2words",),
    tiny=Tiny(tiny_config, tiny_pixels, tiny_run, tuple(TILES), processor=tiny_processor),
)
