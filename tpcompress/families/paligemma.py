"""PaliGemma 1 and 2: one square grid per image; the prefix of images and question has bidirectional attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PaliGemmaConfig

from tpcompress.families.base import Blocks, Family, Tiny
from tpcompress.families.layout import Layout, square
from tpcompress.families.tiny import IMAGE, fixed_pixels, run_of_64, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, square_size, tiny_tokenizer
from tpcompress.families.towers import CLIP_LIKE


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One token per patch."""
    return square(sizes)


def prefix_block(config: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Everything before the answer (token type 0) is one block."""
    types = arguments.get("token_type_ids")
    return None if types is None else torch.where(types == 0, 0, -1)


# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config(text: str = "gemma") -> PaliGemmaConfig:
    """64 vision tokens per image; `gemma2` (PaliGemma 2) alternates windows of 48 with full attention."""
    more: dict[str, Any] = {"head_dim": 16}
    if text == "gemma2":
        more |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 48}
        more |= {"query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0}
    return PaliGemmaConfig(
        text_config=tiny_text(text, **more),
        vision_config=tiny_vision("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )


def token_types(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """0 on images and the two tokens after the last image, 1 on the answer that follows."""
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = torch.where(input_ids == IMAGE, place, -3).amax(1, keepdim=True)
    return {"token_type_ids": (place > last + 2).long()}


def tiny_processor(config: Any) -> Any:
    """Images of 32 x 32 pixels, at least one per sample. The family has no chat template.

    The processor adds 1152 tokens for places and shapes, beyond the vocabulary of the model.
    """
    from transformers import PaliGemmaProcessor

    images = image_processor("SiglipImageProcessor", size=square_size(config.vision_config.image_size))
    images.image_seq_length = 64
    special = {0: "<pad>", 1: "<bos>", 2: "<eos>", IMAGE: "<image>"}
    return PaliGemmaProcessor(images, tiny_tokenizer(special, {"image_token": "<image>"}, bos=True))


# ------------------------------------------------------------------------------------------------------ family

PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=CLIP_LIKE,
    image_layouts=image_layouts,
    one_size=True,
    masks_in_core=True,
    blocks=Blocks(prefix_block, beyond_window=True),
    takes=("images",),
    tiny=Tiny(
        tiny_config,
        fixed_pixels,
        run_of_64,
        arguments=token_types,
        variants=(("gemma",), ("gemma2",)),
        processor=tiny_processor,
    ),  # fmt: skip
    limits=(
        "Without token_type_ids (from the processor), the attention of transformers is bidirectional for unpadded "
        "prompts with sdpa, but causal for padded prompts and with eager attention.",
    ),
)
