"""Janus and Janus-Pro (image understanding only): one fixed grid per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import JanusConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Layout, square
from tpcompress.families.tiny import END, IMAGE, START, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer, turns


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One token per patch."""
    return square(sizes)


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> JanusConfig:
    """64 vision tokens per image, and a minimal image generator."""
    return JanusConfig(
        text_config=tiny_text(),
        vision_config=tiny_vision(
            "janus_vision_model", num_hidden_layers=2, mlp_ratio=1.5, projection_dim=64, num_image_tokens=64
        ),
        vq_config={
            "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1],
            "num_res_blocks": 1, "projection_dim": 16, "num_hidden_layers": 1, "image_token_embed_dim": 64,
        },
        image_token_id=IMAGE,
    )  # fmt: skip


def tiny_run(config: Any, kind: str) -> list[int]:
    """64 placeholders between start and end."""
    return [START, *run_of_64(config, kind), END]


def tiny_processor(config: Any) -> Any:
    """Images of 32 x 32 pixels; the processor writes the marks around placeholders."""
    from transformers import JanusProcessor

    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    special = {0: "<pad>", 1: "<begin>", 2: "<end>"} | dict(zip((IMAGE, START, END), names.values(), strict=True))
    roles = {"system": ("", "\n\n"), "user": ("<|User|>: ", "\n\n"), "assistant": ("<|Assistant|>: ", "<end>")}
    return JanusProcessor(
        image_processor("JanusImageProcessor", size=square_size(config.vision_config.image_size)),
        tiny_tokenizer(special, names, bos=True),
        chat_template=turns(roles, "<|Assistant|>:", "<image_placeholder>\n"),
        num_image_tokens=config.vision_config.num_image_tokens,
    )


# ------------------------------------------------------------------------------------------------------ family

JANUS = Family(
    name="janus",
    model_types=("janus",),
    vision_tower="model.vision_model",
    projector="model.aligner",
    image_layouts=image_layouts,
    one_size=True,
    limits=("Only text generation is pruned, not generation_mode='image'.",),
    tiny=Tiny(tiny_config, fixed_pixels, tiny_run, processor=tiny_processor),
)
