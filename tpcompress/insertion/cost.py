"""Cost of a prefill by formula: tokens per decoder layer, FLOPs of the decoder layers, bytes of the KV cache.

Formulas complement measured times and do not replace them. They are evaluated layer by layer, because a stage inside
the language model leaves the layers before it at full length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tpcompress.insertion.plan import PruningPlan

EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
"""Config attributes of mixture-of-experts layers."""


def count_lengths(
    plan: PruningPlan | None, text_tokens: int, vision_tokens: int, num_layers: int, num_images: int = 1
) -> list[int]:
    """Count the tokens that each decoder layer processes in a prefill.

    Args:
        plan: None for the dense model.
        text_tokens: prompt tokens other than image placeholders.
        vision_tokens: tokens per image that the projector produces.
        num_layers: decoder layers.
        num_images: images in the prompt.

    Returns:
        Sequence length at each layer.

    Raises:
        ValueError: a stage beyond the last layer, or negative counts.
    """
    if min(text_tokens, vision_tokens, num_images) < 0 or num_layers < 1:
        raise ValueError(
            f"Counts must not be negative and layers at least 1, got {text_tokens} text tokens, {num_images} images "
            f"of {vision_tokens} vision tokens and {num_layers} layers."
        )
    rows, per_row = (1, vision_tokens * num_images)
    if plan is None or plan.scope != "prompt":
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
    """FLOPs of the decoder layers in the prefill of one prompt; a multiply-add counts as 2.

    With n tokens in a layer, hidden size D, H query heads and G key heads of width d, and MLP width M, a layer takes

        projections   2 n D (2 H d + 2 G d)     queries and output, keys and values
        attention     4 n^2 H d                 q k and p v over all n^2 pairs; causal kernels may skip half
        MLP           6 n D M                   gate, up and down

    and the head 2 D C per token for a vocabulary of C. Norms, rotary embedding, softmax and activations are left out.

    Args:
        config: of a vision-language model or of its language model (dense layers with a gated MLP, see `has_formula`).
        lengths: tokens per layer, as returned by `count_lengths`.
        head_tokens: tokens whose logits are computed; 1 in a prefill that generates.

    Raises:
        ValueError: not one length per layer.
    """
    text = _text_config(config, lengths)
    width = text.hidden_size
    total = 2 * width * text.vocab_size * head_tokens
    for n, layer in zip(lengths, layer_configs(text), strict=True):
        query, key, inner = layer.num_attention_heads * head_size(layer), key_width(layer), layer.intermediate_size
        total += 2 * n * width * (2 * query + 2 * key) + 4 * n * n * query + 6 * n * width * inner
    return total


def kv_bytes(config: Any, lengths: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the KV cache after the prefill of one prompt: 2 n G d elements per layer.

    Args:
        config: see `decoder_flops`.
        lengths: tokens per layer.
        dtype: cache dtype.

    Raises:
        ValueError: not one length per layer.
    """
    text = _text_config(config, lengths)
    return 2 * sum(n * key_width(layer) for n, layer in zip(lengths, layer_configs(text), strict=True)) * dtype.itemsize


def has_formula(config: Any) -> bool:
    """Whether the formulas hold for a model: every layer has softmax attention with its own keys and one gated MLP.

    Args:
        config: see `decoder_flops`.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    experts = any(getattr(text, name, None) for name in EXPERTS)
    shared = bool(getattr(text, "num_kv_shared_layers", 0))
    first = layer_configs(text)[0]
    complete = hasattr(first, "intermediate_size") and hasattr(first, "num_attention_heads")
    return complete and not experts and not shared and kinds <= {"full_attention", "sliding_attention"}


def layer_configs(text: Any) -> list[Any]:
    """The config of every decoder layer.

    They differ where head sizes do (Gemma 4 Unified); the text config then refuses to give one for all.
    """
    if getattr(text, "is_heterogeneous", False):
        return list(text.per_layer_config)
    return [text] * text.num_hidden_layers


def head_size(layer: Any) -> int:
    """Width of an attention head of a layer, by its config."""
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def key_width(layer: Any) -> int:
    """Width of the keys of a layer, by its config."""
    return int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads) * head_size(layer)


def _text_config(config: Any, lengths: Sequence[int]) -> Any:
    text = config.get_text_config()
    if len(lengths) != text.num_hidden_layers:
        raise ValueError(f"The model has {text.num_hidden_layers} decoder layers, got {len(lengths)} lengths.")
    return text
