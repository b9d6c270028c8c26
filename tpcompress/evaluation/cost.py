"""Cost by formula: FLOPs of the decoder layers and bytes of the KV cache, layer by layer.

Measured seconds belong beside these numbers, never in their place: pruning inside the language model leaves the
early layers long, and a formula over the final length would hide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tpcompress.insertion.plan import PruningPlan


def count_lengths(
    plan: PruningPlan | None, text_tokens: int, vision_tokens: int, num_layers: int, num_images: int = 1
) -> list[int]:
    """Tokens that each decoder layer sees in a prefill.

    Args:
        plan: None for the dense model.
        text_tokens: tokens of the prompt that are no placeholders.
        vision_tokens: what the projector produces for each image.
        num_layers: decoder layers.
        num_images: images in the prompt.

    Raises:
        ValueError: a stage beyond the last layer, or negative numbers.
    """
    if min(text_tokens, vision_tokens, num_images) < 0 or num_layers < 1:
        raise ValueError(
            f"Counts must not be negative and layers at least 1, got {text_tokens} text tokens, {num_images} images "
            f"of {vision_tokens} vision tokens and {num_layers} layers."
        )
    rows, per_row = (1, vision_tokens * num_images)
    if plan is None or plan.scope == "image":
        rows, per_row = num_images, vision_tokens
    lengths = [text_tokens + rows * per_row] * num_layers
    if plan is None or not rows * per_row:
        return lengths
    for stage, kept in zip(plan.stages, plan.counts(per_row), strict=True):
        if stage.layer >= num_layers:
            raise ValueError(
                f"A stage acts at layer {stage.layer}, but there are {num_layers} (0 to {num_layers - 1})."
            )
        lengths[stage.layer :] = [text_tokens + rows * kept] * (num_layers - stage.layer)
    return lengths


def decoder_flops(config: Any, lengths: Sequence[int], head_tokens: int = 0) -> int:
    """FLOPs of a prefill of one prompt through the decoder layers, a multiply-add counted as 2.

    With n tokens in a layer, hidden size D, H query and G key heads of width d, and MLP width M, each layer takes

        projections   2 n D (2 H d + 2 G d)     queries and output, keys and values
        attention     4 n^2 H d                 q k and p v, all n^2 pairs: causal kernels may skip half
        MLP           6 n D M                   gate, up and down

    and the head 2 D C per token for a vocabulary of C. Norms, rotary embedding, softmax and activations are left out.

    Args:
        config: of a vision-language model or of its language model (Llama-like: gated MLP, no experts).
        lengths: tokens that each layer sees, as `count_lengths` gives them.
        head_tokens: tokens whose logits are computed; 1 in a prefill that generates.

    Raises:
        ValueError: not one length per layer.
    """
    text = _text_config(config, lengths)
    width, inner = text.hidden_size, text.intermediate_size
    query, key = text.num_attention_heads * _head_size(text), _key_heads(text) * _head_size(text)
    total = 2 * width * text.vocab_size * head_tokens
    for n in lengths:
        total += 2 * n * width * (2 * query + 2 * key) + 4 * n * n * query + 6 * n * width * inner
    return total


def kv_bytes(config: Any, lengths: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the KV cache after the prefill of one prompt: 2 n G d per layer, in `dtype`.

    Args:
        config: as in `decoder_flops`.
        lengths: tokens that each layer holds.
        dtype: of the cache.

    Raises:
        ValueError: not one length per layer.
    """
    text = _text_config(config, lengths)
    return 2 * sum(lengths) * _key_heads(text) * _head_size(text) * dtype.itemsize


def _text_config(config: Any, lengths: Sequence[int]) -> Any:
    text = config.get_text_config()
    if len(lengths) != text.num_hidden_layers:
        raise ValueError(f"The model has {text.num_hidden_layers} decoder layers, got {len(lengths)} lengths.")
    return text


def _key_heads(text: Any) -> int:
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _head_size(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
