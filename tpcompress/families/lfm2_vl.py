"""LFM2-VL: images or tiles of any size; most decoder layers are short convolutions, applied to retained tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Lfm2VlConfig

from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.layout import Layout, plain
from tpcompress.families.tiny import END, IMAGE, START, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import chatml, tiny_tokenizer


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One token per square of patches; a marker token stands before every tile."""
    step = config.downsample_factor
    return [plain(rows // step, cols // step) for rows, cols in inputs["spatial_shapes"].tolist()]


# ------------------------------------------------------------------------------------------------ test fixture

TILES = {"image": ((6, 8),), "wide": ((4, 6), (4, 6), (3, 7))}
"""Rows and columns of tokens by kind: one image, or tiles and a small overview."""


def tiny_config(text: str = "lfm2") -> Lfm2VlConfig:
    """4 px patches, 2 x 2 of them per token; attention in layers 1, 3 and 4, convolution elsewhere."""
    kinds = ["conv", "full_attention", "conv", "full_attention", "full_attention", "conv"]
    more: dict[str, Any] = {"layer_types": kinds, "block_auto_adjust_ff_dim": False}
    if text == "lfm2_moe":
        more = {"layer_types": kinds, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        more["num_dense_layers"] = 2
    return Lfm2VlConfig(
        text_config=tiny_text(text, **more),
        vision_config=tiny_vision("siglip2_vision_model", num_patches=64, vision_use_head=False),
        image_token_id=IMAGE,
        projector_hidden_size=64,
    )


def tiny_run(config: Any, kind: str) -> list[int]:
    """Placeholders of every tile after a marker token."""
    tiles = enumerate(TILES[kind])
    return [START, *[token for i, (rows, cols) in tiles for token in (105 + i, *[IMAGE] * rows * cols)], END]


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Patches of every tile, padded to the same number, with their shapes (tiles, 2) and the mask of patches."""
    step = config.downsample_factor
    shapes = [(r * step, c * step) for sample in samples for kind in sample for r, c in TILES[kind]]
    if not shapes:
        return {}
    counts = torch.tensor([rows * cols for rows, cols in shapes])
    real = torch.arange(int(counts.max()) + 5) < counts[:, None]
    pixels = torch.randn(*real.shape, 3 * config.vision_config.patch_size**2, generator=generator)
    return {
        "pixel_values": pixels * real[..., None],
        "spatial_shapes": torch.tensor(shapes),
        "pixel_attention_mask": real.long(),
    }


def tiny_processor(config: Any) -> Any:
    """Images of 4 to 16 tokens, or two to four tiles of 16 tokens and an overview."""
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    tiles = {105 + 2 * row + col: f"<|img_row_{row + 1}_col_{col + 1}|>" for row in range(2) for col in range(2)}
    names = {
        "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }  # fmt: skip
    special = {0: "<|pad|>", 1: "<|startoftext|>", 2: "<|im_end|>", 110: "<|im_start|>"}
    special |= dict(zip((IMAGE, START, END, 109), names.values(), strict=True))
    patch, factor = config.vision_config.patch_size, config.downsample_factor
    return Lfm2VlProcessor(
        Lfm2VlImageProcessor(
            encoder_patch_size=patch, downsample_factor=factor, tile_size=4 * patch * factor, max_tiles=4,
            min_image_tokens=4, max_image_tokens=16,
        ),
        tiny_tokenizer(special | tiles, names, bos=True),
        chat_template=chatml("<image>", start="<|startoftext|>"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ family

LFM2_VL = Family(
    name="lfm2_vl",
    model_types=("lfm2_vl",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    final_norm="embedding_norm",
    image_layouts=image_layouts,
    tiles=Tiles(gap=1),
    tiny=Tiny(
        tiny_config, tiny_pixels, tiny_run, tuple(TILES), variants=(("lfm2",), ("lfm2_moe",)), processor=tiny_processor
    ),
)
