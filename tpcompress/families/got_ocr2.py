"""GOT-OCR 2: adjacent square tiles or pages, sixteen patches of a convolutional tower per token."""

from __future__ import annotations

from typing import Any

from transformers import GotOcr2Config

from tpcompress.families import internvl
from tpcompress.families.base import Family, Tiles, Tiny
from tpcompress.families.tiny import END, IMAGE, START, tiny_text
from tpcompress.families.tiny_processor import CHATML, chatml, image_processor, square_size, tiny_tokenizer


def patches_per_token(config: Any) -> int:
    """Two convolutions of stride 2 make one token of 4 x 4 patches."""
    return 16


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config(size: int = 96) -> GotOcr2Config:
    """36 vision tokens per tile (96 px, patch 4, side halved twice), or 256 in tiles of 256 px."""
    return GotOcr2Config(
        text_config=tiny_text("qwen2"),
        vision_config={
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 48,
            "image_size": size, "patch_size": 4, "window_size": 7, "global_attn_indexes": [2] if size == 96 else [],
        },
        image_token_index=IMAGE,
        image_seq_length=(size // 16) ** 2,
    )  # fmt: skip


def tiny_processor(config: Any) -> Any:
    """One image of 256 tokens, a number that the processor does not read from any file; every sample has one.

    The published processor has no chat template; this one writes the prompt that the processor makes without text.
    """
    from transformers import GotOcr2Processor

    size = config.vision_config.image_size
    return GotOcr2Processor(
        image_processor("GotOcr2ImageProcessor", size=square_size(size)),
        tiny_tokenizer(CHATML | {IMAGE: "<imgpad>", START: "<img>", END: "</img>"}, {"image_token": "<imgpad>"}),
        chat_template=chatml("<img><imgpad></img>\n"),
    )


# ------------------------------------------------------------------------------------------------------ family

GOT_OCR2 = Family(
    name="got_ocr2",
    model_types=("got_ocr2",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    image_layouts=internvl.image_layouts,
    tiles=Tiles(gap=0),
    takes=("turns",),
    patches_per_token=patches_per_token,
    tiny=Tiny(
        tiny_config, internvl.tiny_pixels, internvl.tiny_ids, ("image", "wide"), processor=tiny_processor, saved=(256,)
    ),
    limits=(
        "The pages of one prompt count as one image, because no token separates them.",
        "transformers supports only eager attention for it.",
    ),
)
