"""Random models, prompts, and the reference ("ideal") computation for the benchmarks.

The ideal of a stage before the language model is the unmodified model with an image of as few tokens. The ideal of a
stage at layer K is built from the model's own layers: K layers on the full sequence, a gather, the rest on the short
sequence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE, VIDEO, START, END = 3, 4, 5, 6
FIRST_WORD = 10
HEAD_SPLIT = (2, 3, 3)
"""Eighths of half a head that M-RoPE assigns to time, height and width, as in Qwen2.5-VL."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its prompt.

    Attributes:
        layers, width, heads, mlp, vocab: sizes of the language model.
        side: side of the square grid of vision tokens.
        text: text tokens of the prompt.
    """

    layers: int = 8
    width: int = 512
    heads: int = 8
    mlp: int = 1408
    vocab: int = 4096
    side: int = 24
    text: int = 64

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 16:
            raise ValueError(
                f"width {self.width} with {self.heads} heads gives a head size of {self.width / self.heads:g}; "
                f"choose a multiple of {16 * self.heads}."
            )
        if self.text < 4 or self.side < 2 or self.layers < 1 or self.vocab <= FIRST_WORD:
            raise ValueError(f"text must be at least 4, side 2, layers 1 and vocab {FIRST_WORD + 1}; got {self}.")

    @property
    def text_config(self) -> dict[str, Any]:
        """Config entries common to both language models."""
        return {
            "hidden_size": self.width, "intermediate_size": self.mlp, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "vocab_size": self.vocab,
            "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


def llava(shape: Shape, attention: str = "sdpa") -> PreTrainedModel:
    """A random LLaVA with a Llama and a small CLIP tower (the tower is not timed)."""
    tower = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 14 * shape.side, "patch_size": 14,
    }  # fmt: skip
    text = {"model_type": "llama", **shape.text_config}
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def qwen(shape: Shape, attention: str = "sdpa") -> PreTrainedModel:
    """A random Qwen2.5-VL with M-RoPE and a small tower (the tower is not timed)."""
    section = [part * shape.width // shape.heads // 16 for part in HEAD_SPLIT]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    tower = {
        "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": shape.width, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**shape.text_config, "rope_parameters": rope},
        vision_config=tower,
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


MODELS = {"llava": llava, "qwen": qwen}


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares its weights, so that only one of them gets a plan."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def features(model: Any, shape: Shape) -> BaseModelOutputWithPooling:
    """Encoder outputs of a model, attached or not, for one random image."""
    device, dtype = model.device, model.dtype
    if hasattr(model.model, "visual"):
        grid = torch.tensor([[1, 2 * shape.side, 2 * shape.side]], device=device)
        patches = torch.randn(4 * shape.side**2, 3 * 2 * 14 * 14, device=device, dtype=dtype)
        return model.get_image_features(patches, image_grid_thw=grid, return_dict=True)
    pixels = torch.randn(1, 3, 14 * shape.side, 14 * shape.side, device=device, dtype=dtype)
    return model.get_image_features(pixel_values=pixels, return_dict=True)


def prompt(model: Any, shape: Shape, rows: int, cols: int, encoded: Any) -> dict[str, Any]:
    """Inputs of a prefill with an image of `rows` x `cols` vision tokens between two halves of the text.

    Args:
        model: model for the inputs.
        shape: number of text tokens, and vocabulary size.
        rows, cols: grid of the image.
        encoded: encoder outputs of the image.
    """
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(FIRST_WORD, shape.vocab, (shape.text - 2,), generator=generator).tolist()
    half = len(words) // 2
    ids = torch.tensor([[*words[:half], START, *[IMAGE] * (rows * cols), END, *words[half:]]], device=model.device)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": {"image": encoded},
        "use_cache": True, "logits_to_keep": 1,
    }  # fmt: skip
    if hasattr(model.model, "visual"):
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * rows, 2 * cols]], device=model.device)
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs


def shortened(model: Any, shape: Shape, encoded: Any, kept: Tensor) -> dict[str, Any]:
    """Inputs of the same prompt with an image of `len(kept)` tokens: the ideal of a stage before the language model.

    Args:
        model: model for the inputs.
        shape: sizes of the prompt.
        encoded: encoder outputs of the full image.
        kept: int64 (R,): indices of the tokens in the short image.
    """
    side = round(len(kept) ** 0.5)
    rows, cols = (side, side) if side * side == len(kept) else (1, len(kept))
    few: Any = BaseModelOutputWithPooling()
    few.pooler_output = [encoded.pooler_output[0][kept]]
    return prompt(model, shape, rows, cols, few)


def short_from_layer(model: Any, inputs: dict[str, Any], layer: int, columns: Tensor) -> tuple[Tensor, DynamicCache]:
    """Prefill of an unmodified model whose layers from `layer` on process some columns only.

    Args:
        model: model without a plan.
        inputs: inputs of the full prompt, from `prompt`.
        layer: first layer with fewer columns.
        columns: int64 (N,): columns of that layer.

    Returns:
        logits (1, 1, C) of the last column, and the cache.
    """
    core, text, ids = model.model, model.model.language_model, inputs["input_ids"]
    hidden = model.get_input_embeddings()(ids)
    vision = torch.cat(tuple(inputs["mm_encoder_outputs"]["image"].pooler_output)).to(hidden.dtype)
    place = core.get_placeholder_mask(ids, inputs_embeds=hidden, image_features=vision)
    hidden = hidden.masked_scatter(place[0] if isinstance(place, tuple) else place, vision)
    if hasattr(core, "compute_3d_position_ids"):
        grids = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids", "attention_mask")}
        positions = core.compute_3d_position_ids(
            ids, video_grid_thw=None, inputs_embeds=hidden, past_key_values=None, **grids
        )
    else:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    cache, mask = DynamicCache(config=text.config), inputs["attention_mask"]
    rotary = text.rotary_emb(hidden, positions)
    seen = create_causal_mask(config=text.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=None)
    for index, block in enumerate(text.layers):
        if index == layer:
            hidden = hidden[:, columns]
            rotary = tuple(x[:, columns] for x in rotary)
            seen = create_causal_mask(
                config=text.config, inputs_embeds=hidden, attention_mask=mask[:, columns], past_key_values=None
            )
        hidden = block(
            hidden, attention_mask=seen, position_embeddings=rotary, position_ids=None, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
    return model.lm_head(text.norm(hidden)[:, -1:]), cache
