"""LLaVA-NeXT: an overview, then the merged tiles without padding, with a newline token after every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from transformers import LlavaNextConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import IMAGE, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer, turns
from tpcompress.families.towers import TILED


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """Overview and merged tiles of each image; the image size determines the padding."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [overview_and_tiles(side, *unpadded(config, side, size)) for size in as_lists(inputs["image_sizes"])]


def unpadded(config: Any, side: int, image_size: list[int]) -> tuple[int, int]:
    """Rows and columns of the merged tiles of an image, without padding.

    Args:
        config: config of the model.
        side: rows (and columns) of one tile in tokens.
        image_size: height and width of the image.
    """
    # Imported here, because importing tpcompress must not load modeling files.
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    rows, cols = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, config.vision_config.image_size)
    # The model's own function on a meta tensor, so that rounding is the same as in the model.
    cut = unpad_image(torch.empty(0, rows * side, cols * side, device="meta"), image_size)
    return cut.shape[1], cut.shape[2]


@cache
def overview_and_tiles(side: int, rows: int, cols: int) -> Layout:
    """A square overview without newlines, then a grid with newlines."""
    return Layout((Grid(side, side), Grid(rows, cols, newline=True)))


def as_lists(image_sizes: Any) -> list[list[int]]:
    """Convert `image_sizes` (images, 2), a tensor or nested sequence, to lists."""
    return image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else [list(size) for size in image_sizes]


# ------------------------------------------------------------------------------------------------ test fixture

SIZES = {"image": (24, 32), "wide": (20, 64)}
"""(height, width) in pixels by kind, before resizing."""

PINPOINTS = [[16, 32], [32, 16], [32, 32]]
"""Sizes to which images are resized before they are split into tiles of 16 x 16."""

TILES = {"image": 5, "wide": 3}
"""Number of tiles by kind, including the overview."""

COUNTS = {"image": 16 + 6 * (8 + 1), "wide": 16 + 2 * (8 + 1)}
"""Number of placeholders by kind: an overview of 4 x 4, then 6 or 2 rows of 8 tokens and a newline."""


def tiny_config(tower: str = "clip_vision_model", text: str = "llama") -> LlavaNextConfig:
    """Tiles of 4 x 4 vision tokens (16 px, patch 4): 64 in `image`, 32 in `wide`."""
    return LlavaNextConfig(
        text_config=tiny_text(text),
        vision_config=tiny_vision(tower, image_size=16),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default" if tower == "clip_vision_model" else "full",
        image_grid_pinpoints=PINPOINTS,
    )


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Tiles, padded to the same number per image, and the sizes of the images."""
    images = [kind for kinds in samples for kind in kinds if kind != "video"]
    if not images:
        return {}
    most, size = max(TILES[kind] for kind in images), config.vision_config.image_size
    pixels = torch.randn(len(images), most, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[kind] for kind in images])}


def tiny_ids(config: Any, kind: str) -> list[int]:
    """Placeholders of an image, including newlines."""
    return [IMAGE] * COUNTS[kind]


def tiny_processor(config: Any) -> Any:
    """Tiles of 16 x 16 pixels; instructions between tags, answers end with the end token."""
    from transformers import LlavaNextProcessor

    size = config.vision_config.image_size
    roles = {"system": ("", " "), "user": ("[INST] ", " [/INST]"), "assistant": (" ", "</s>")}
    return LlavaNextProcessor(
        image_processor(
            "LlavaNextImageProcessor", size={"shortest_edge": size}, crop_size=square_size(size),
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tiny_tokenizer({0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>"}, {"image_token": "<image>"}, bos=True),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=turns(roles, "", "<image>\n"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ family

LLAVA_NEXT = Family(
    name="llava_next",
    model_types=("llava_next",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=TILED,
    image_layouts=image_layouts,
    tiny=Tiny(
        tiny_config, tiny_pixels, tiny_ids, kinds=("image", "wide"),
        variants=((), ("siglip_vision_model", "qwen2")), processor=tiny_processor,
    ),
)  # fmt: skip
