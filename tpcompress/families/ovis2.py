"""Ovis2: square tiles, overview first, embedded as mixtures of visual words; text tokens between tiles."""

from __future__ import annotations

from typing import Any

from transformers import Ovis2Config

from tpcompress.families import internvl
from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.tiny import END, IMAGE, START, tiny_text
from tpcompress.families.tiny_processor import CHATML, chatml, image_processor, square_size, tiny_tokenizer

# ------------------------------------------------------------------------------------------------ test fixture

GRID, COLUMN, ROW = 105, 106, 107
"""Ids of the marker tokens after the overview, between tiles of a row, and between rows."""


def tiny_config() -> Ovis2Config:
    """36 vision tokens per tile: 12 x 12 patches merged two by two."""
    return Ovis2Config(
        text_config=tiny_text("qwen2"),
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 24, "patch_size": 2, "hidden_stride": 2, "vocab_size": 69, "num_visual_indicator_tokens": 5,
        },
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, GRID, COLUMN, ROW, END],
        vocab_size=128,
        hidden_size=64,
    )  # fmt: skip


def tiny_ids(config: Any, kind: str) -> list[int]:
    """The overview, then two tiles side by side if the image is wide."""
    tile = [IMAGE] * 36
    tiles = tile + [COLUMN] + tile if internvl.TILES[kind] > 1 else []
    return [START, *tile, GRID, *tiles, END]


def tiny_processor(config: Any) -> Any:
    """An overview, and up to three tiles of large images; 36 tokens each."""
    from transformers import Ovis2Processor

    marks = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "<image>")
    special = dict(zip((IMAGE, START, GRID, COLUMN, ROW, END, 108), marks, strict=True))
    return Ovis2Processor(
        image_processor(
            "Ovis2ImageProcessor", size=square_size(config.vision_config.image_size), crop_to_patches=True,
            max_patches=3,
        ),
        tiny_tokenizer(CHATML | special, {}),
        chat_template=chatml("<image>\n", system="You are a helpful assistant."),
        image_seq_length=36,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ family

OVIS2 = Family(
    name="ovis2",
    model_types=("ovis2",),
    vision_tower="model.vision_tower",
    projector="model.visual_embeddings_table",
    image_layouts=internvl.image_layouts,
    tiles=Tiles(gap=1),
    tiny=Tiny(tiny_config, internvl.tiny_pixels, tiny_ids, ("image", "wide"), processor=tiny_processor),
)
