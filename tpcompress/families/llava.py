"""LLaVA 1.5 and similar models: CLIP, SigLIP or DINOv2 tower, two-layer projector, one fixed grid per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlavaConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Layout, plain
from tpcompress.families.tiny import IMAGE, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer
from tpcompress.families.towers import CLIP_LIKE, DINO, WITH_CLASS

TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2")


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """Every image has the same grid of patches; with a class token among them there is no grid."""
    patch, pixels = config.vision_config.patch_size, inputs["pixel_values"]
    rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    return [plain(rows, cols) if rows * cols == size else plain(1, size) for size in sizes]


def refuse(config: Any) -> str | None:
    """Refuse towers whose vision tokens do not form one fixed grid."""
    tower = config.vision_config.model_type
    if tower not in TOWERS:
        return f"vision tower '{tower}' is not supported; supported: {', '.join(TOWERS)}."
    return None


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config(tower: str = "clip_vision_model", layers: int = 6) -> LlavaConfig:
    """64 vision tokens per image (32 px, patch 4), a 3-layer tower and a `layers`-layer Llama of width 64."""
    return LlavaConfig(
        text_config=tiny_text(num_hidden_layers=layers),
        vision_config=tiny_vision(tower),
        image_token_index=IMAGE,
        image_seq_length=64,
        vision_feature_select_strategy="default" if tower in WITH_CLASS else "full",
    )


TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] != 'system' -%}{{- message['role'] | upper + ': ' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{%- set texts = [message['content']] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}"
    "{%- endif -%}"
    "{%- for text in texts -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- text + ' ' -}}{%- endgeneration -%}"
    "{%- else -%}{{- text + ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
"""Images before the text of a turn; no token ends an answer."""


def tiny_processor(config: Any) -> Any:
    """Images of 32 x 32 pixels; the tower's class token is counted and then dropped, as in llava-1.5."""
    from transformers import LlavaProcessor

    size = config.vision_config.image_size
    return LlavaProcessor(
        image_processor("LlavaImageProcessor", size={"shortest_edge": size}, crop_size=square_size(size)),
        tiny_tokenizer({0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>"}, {"image_token": "<image>"}, bos=True),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------------ family

LLAVA = Family(
    name="llava",
    model_types=("llava",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=CLIP_LIKE,
    towers=(("dinov2", DINO),),
    image_layouts=image_layouts,
    one_size=True,
    refuse=refuse,
    tiny=Tiny(
        tiny_config,
        fixed_pixels,
        run_of_64,
        variants=(("clip_vision_model",), ("siglip_vision_model",)),
        processor=tiny_processor,
    ),
)
