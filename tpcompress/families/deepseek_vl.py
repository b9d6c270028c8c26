"""DeepSeek-VL, also with a second high-resolution tower: one fixed grid per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DeepseekVLConfig, DeepseekVLHybridConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Layout, square
from tpcompress.families.tiny import IMAGE, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer, turns


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One token per patch; the second tower only adds channels."""
    return square(sizes)


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config(hybrid: bool = False) -> DeepseekVLConfig | DeepseekVLHybridConfig:
    """64 vision tokens per image; `hybrid` has a second tower for 64 x 64 pixels."""
    parts: dict[str, Any] = {
        "text_config": tiny_text(),
        "vision_config": tiny_vision("siglip_vision_model", vision_use_head=False),
        "image_token_id": IMAGE,
    }
    if not hybrid:
        return DeepseekVLConfig(**parts)
    second = {
        "model_type": "sam_vision_model", "hidden_size": 32, "mlp_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 64, "patch_size": 8, "output_channels": 8, "window_size": 4,
        "global_attn_indexes": [1],
    }  # fmt: skip
    return DeepseekVLHybridConfig(**parts, high_res_vision_config=second)


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Images of one size, and the same number at high resolution if the model has a second tower."""
    inputs = fixed_pixels(config, samples, generator)
    second = getattr(config, "high_res_vision_config", None)
    if inputs and second is not None:
        shape = (len(inputs["pixel_values"]), 3, second.image_size, second.image_size)
        inputs["high_res_pixel_values"] = torch.randn(shape, generator=generator)
    return inputs


IMAGE_TOKEN = "<image_placeholder>"


def tiny_processor(config: Any) -> Any:
    """Images of 32 x 32 pixels, and of 64 x 64 for a second tower; the end token ends answers only."""
    import transformers

    size, second = config.vision_config.image_size, getattr(config, "high_res_vision_config", None)
    name, sizes = "DeepseekVLHybrid" if second else "DeepseekVL", {"size": square_size(size)}
    if second is not None:
        sizes["high_res_size"] = square_size(second.image_size)
    roles = {"system": ("", "\n\n"), "user": ("User: ", "\n\n"), "assistant": ("Assistant: ", "<end>")}
    return getattr(transformers, f"{name}Processor")(
        image_processor(f"{name}ImageProcessor", **sizes),
        tiny_tokenizer({0: "<pad>", 1: "<begin>", 2: "<end>", IMAGE: IMAGE_TOKEN}, {"image_token": IMAGE_TOKEN}, True),
        chat_template=turns(roles, "Assistant:", IMAGE_TOKEN, start="<begin>"),
        num_image_tokens=(size // config.vision_config.patch_size) ** 2,
    )


# ------------------------------------------------------------------------------------------------------ family

DEEPSEEK_VL = Family(
    name="deepseek_vl",
    model_types=("deepseek_vl", "deepseek_vl_hybrid"),
    vision_tower="model.vision_model",
    projector="model.aligner",
    image_layouts=image_layouts,
    one_size=True,
    tiny=Tiny(tiny_config, tiny_pixels, run_of_64, variants=((), (True,)), processor=tiny_processor),
)
