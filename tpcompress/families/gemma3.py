"""Gemma 3: one square grid of pooled tokens per image with bidirectional attention; most layers are sliding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3Config

from tpcompress.families.base import Blocks, Family, Tiny
from tpcompress.families.layout import Layout, square
from tpcompress.families.tiny import END, IMAGE, START, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer
from tpcompress.families.towers import AVERAGING


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """Patches are averaged to a square grid; crops of pan and scan are separate images."""
    return square(sizes)


def number_runs(vision: Tensor) -> Tensor:
    """Number the runs of True in each row.

    Args:
        vision: bool (B, S).

    Returns:
        int64 (B, S): 0, 1, ... for each run, -1 elsewhere.
    """
    starts = vision.clone()
    starts[:, 1:] &= ~vision[:, :-1]
    return torch.where(vision, starts.cumsum(1) - 1, -1)


def image_blocks(config: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Every run of image tokens is a block."""
    types = arguments.get("token_type_ids")
    return None if types is None else number_runs(types == 1)


def refuse(config: Any) -> str | None:
    """Refuse encoders that are built from a decoder."""
    if config.get_text_config().use_bidirectional_attention:
        return "its text attention is bidirectional; use_bidirectional_attention=False is supported."
    return None


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config() -> Gemma3Config:
    """64 vision tokens per image (16 x 16 patches); window 48, full attention in layers 1 and 4."""
    text = tiny_text("gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=48)
    text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"] * 2
    return Gemma3Config(
        text_config=text,
        vision_config=tiny_vision("siglip_vision_model", patch_size=2, vision_use_head=False),
        mm_tokens_per_image=64,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def tiny_run(config: Any, kind: str) -> list[int]:
    """64 placeholders between start and end."""
    return [START, *run_of_64(config, kind), END]


def token_types(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """1 on image tokens."""
    return {"token_type_ids": (input_ids == IMAGE).long()}


TOKENS = {
    0: "<pad>", 1: "<bos>", 2: "<eos>", IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>",
    105: "<start_of_turn>", 106: "<end_of_turn>",
}  # fmt: skip

TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set system = '' -%}{%- set turns = messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set turns = messages[1:] -%}"
    "{%- set system = messages[0]['content'] -%}"
    "{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') -}}"
    "{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' -}}"
    "{%- if loop.first and system -%}{{- system + '\n\n' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<end_of_turn>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
"""The system prompt is the start of the first user turn; roles must alternate."""


def tiny_processor(config: Any) -> Any:
    """Images of 32 x 32 pixels and 64 tokens. The tokenizer adds the start token, which the template writes too."""
    from transformers import Gemma3Processor

    names = {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    }  # fmt: skip
    return Gemma3Processor(
        image_processor("Gemma3ImageProcessor", size=square_size(config.vision_config.image_size)),
        tiny_tokenizer(TOKENS, names, bos=True),
        chat_template=TEMPLATE,
        image_seq_length=config.mm_tokens_per_image,
    )


# ------------------------------------------------------------------------------------------------------ family

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=AVERAGING,
    image_layouts=image_layouts,
    one_size=True,
    masks_in_core=True,
    blocks=Blocks(image_blocks),
    refuse=refuse,
    limits=("With do_pan_and_scan every crop counts as an image.",),
    tiny=Tiny(tiny_config, fixed_pixels, tiny_run, arguments=token_types, processor=tiny_processor),
)
