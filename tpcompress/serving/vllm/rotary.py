"""Longer tables of rotary angles.

vLLM computes the angles of all positions when a model is built, up to its last position or a multiple of it, because a
token's position is its index in the sequence. With original positions an answer goes on after the end of the unpruned
prompt, and may reach positions that the table lacks; vLLM's kernels would read past its end.
"""

from __future__ import annotations

import torch
from torch import nn


def extend_rotary(model: nn.Module, positions: int) -> None:
    """Recompute every table of rotary angles that has fewer positions.

    Args:
        model: the language model.
        positions: number of positions that a table must have.

    Raises:
        ValueError: the table of a scaled rotary embedding is too short, and its angles depend on its length.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    for rotary in model.modules():
        if not isinstance(rotary, RotaryEmbeddingBase) or len(rotary.cos_sin_cache) >= positions:
            continue
        kind, table = type(rotary), rotary.cos_sin_cache
        if kind._compute_cos_sin_cache is not RotaryEmbeddingBase._compute_cos_sin_cache:
            raise ValueError(
                f"The rotary table of vLLM's {kind.__name__} has {len(table)} positions, and answers at original "
                f"positions may reach {positions}; export with positions: compact, or serve with a smaller "
                f"--max-model-len."
            )
        rotary.max_position_embeddings = positions
        with torch.device(table.device):
            rotary.cos_sin_cache = rotary._compute_cos_sin_cache().to(table.dtype)
        if rotary.cos_sin_cache_bf16 is not None:
            rotary.cos_sin_cache_bf16 = rotary.cos_sin_cache.to(torch.bfloat16)
