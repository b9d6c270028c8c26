"""GOT-OCR 2: adjacent square tiles or pages, sixteen patches of a convolutional tower per token."""

from __future__ import annotations

from typing import Any

from transformers import GotOcr2Config

from tpcompress.families import internvl
from tpcompress.families.base import Family, Tiny
from tpcompress.families.tiny import IMAGE, tiny_text


def patches_per_token(config: Any) -> int:
    """Two convolutions of stride 2 make one token of 4 x 4 patches."""
    return 16


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> GotOcr2Config:
    """36 vision tokens per tile (96 px, patch 4, side halved twice)."""
    return GotOcr2Config(
        text_config=tiny_text("qwen2"),
        vision_config={
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 48,
            "image_size": 96, "patch_size": 4, "window_size": 7, "global_attn_indexes": [2],
        },
        image_token_index=IMAGE,
        image_seq_length=36,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ family

GOT_OCR2 = Family(
    name="got_ocr2",
    model_types=("got_ocr2",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    image_layouts=internvl.image_layouts,
    joins_tiles=True,
    patches_per_token=patches_per_token,
    tiny=Tiny(tiny_config, internvl.tiny_pixels, internvl.tiny_ids, kinds=("image", "wide")),
    limits=(
        "The pages of one prompt count as one image, because no token separates them.",
        "transformers supports only eager attention for it.",
    ),
)
