"""InternVL 2.5 to 3.5: adjacent square tiles, overview last, four patches per token; video frames are images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import InternVLConfig

from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.layout import Layout, square
from tpcompress.families.tiny import END, IMAGE, START, VIDEO, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import CHATML, chatml, image_processor, square_size, tiny_tokenizer
from tpcompress.families.towers import SHUFFLING


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One square grid per tile, as the encoder's pixel shuffle requires square grids of patches."""
    return square(sizes)


# ------------------------------------------------------------------------------------------------ test fixture

TILES = {"image": 1, "wide": 3}
"""Number of tiles by kind."""

TEXTS = ("qwen2", "qwen3", "qwen3_moe")


def tiny_config(text: str = "qwen2") -> InternVLConfig:
    """36 vision tokens per tile (24 px, patch 2)."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": []}
    heads = {} if text == "qwen2" else {"head_dim": 16}
    return InternVLConfig(
        text_config=tiny_text(text, **heads, **(experts if text == "qwen3_moe" else {})),
        vision_config=tiny_vision("internvl_vision", image_size=24, patch_size=2),
        image_token_id=IMAGE,
        image_seq_length=36,
        downsample_ratio=0.5,
    )


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Tiles (tiles, 3, size, size) of all images."""
    tiles, size = sum(TILES[kind] for kinds in samples for kind in kinds), config.vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(tiles, 3, height, width, generator=generator)} if tiles else {}


def tiny_ids(config: Any, kind: str) -> list[int]:
    """The tiles of an image between start and end."""
    return [START] + [IMAGE] * 36 * TILES[kind] + [END]


TOKENS = CHATML | {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>"}

NAMES = {
    "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>", "start_image_token": "<img>",
    "end_image_token": "</img>",
}  # fmt: skip


def tile_processor(config: Any) -> Any:
    """One to three tiles of the size of the tower, and an overview of images with several."""
    size = config.vision_config.image_size
    side = size[0] if isinstance(size, list | tuple) else size
    return image_processor(
        "GotOcr2ImageProcessor", size=square_size(side), crop_to_patches=True, min_patches=1, max_patches=3
    )


def tiny_processor(config: Any) -> Any:
    """ChatML with a line break after every image; the frames of a video are tiles with text between them."""
    from transformers import InternVLProcessor, InternVLVideoProcessor

    return InternVLProcessor(
        tile_processor(config),
        tiny_tokenizer(TOKENS, NAMES),
        InternVLVideoProcessor(size=square_size(config.vision_config.image_size[0])),
        image_seq_length=config.image_seq_length,
        chat_template=chatml("<IMG_CONTEXT>\n", "<video>\n"),
    )


# ------------------------------------------------------------------------------------------------------ family

INTERNVL = Family(
    name="internvl",
    model_types=("internvl",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=SHUFFLING,
    image_layouts=image_layouts,
    tiles=Tiles(gap=0),
    tiny=Tiny(
        tiny_config,
        tiny_pixels,
        tiny_ids,
        kinds=("image", "wide"),
        variants=tuple((text,) for text in TEXTS),
        processor=tiny_processor,
    ),  # fmt: skip
    limits=("Every frame of a video counts as a separate image, because the prompt has text between frames.",),
)
