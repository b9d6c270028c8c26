"""Estimates, by formula, of the memory of a run and of the work of a step, from what its first batch becomes.

In bytes, for the micro-batch of one device, before sharding:

    weights        all parameters and buffers
    gradients      parameters that train
    optimizer      two moments of AdamW per parameter that trains
    activations    per token and decoder layer: 4 D + 2 Q + 2 G + 3 M values, and 2 C fp32 values per answer token

with hidden size D, query width Q, key width G, MLP width M and vocabulary C. Gradient checkpointing keeps D values per
token and layer, and one layer whole. Left out: the vision tower's activations, kernels' buffers, teachers.

A step takes the FLOPs of the forward pass (`tpcompress.insertion.cost`; 2 per weight of the vision tower and patch),
once more for the gradients of activations, once more for those of weights if the language model trains, and once more
with gradient checkpointing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpcompress.families import Parts
from tpcompress.insertion.cost import decoder_flops, has_formula, head_size, key_width, layer_configs

MATRIX = 1024
"""Side of the matrices whose product is timed."""


@dataclass(frozen=True)
class Estimate:
    """Memory of a run in bytes, and FLOPs of a micro-batch; None where the formula does not hold.

    Attributes:
        weights, gradients, optimizer: bytes.
        activations: bytes of the decoder layers and the output head.
        flops: of forward and backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    flops: int | None

    @property
    def memory(self) -> int:
        """Bytes of everything."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


def estimate(
    parts: Parts,
    module: nn.Module,
    lengths: Sequence[Sequence[int]],
    vision_tokens: int,
    answers: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
) -> Estimate:
    """Estimate a step.

    Args:
        parts: of the model.
        module: everything that trains or is held, the model included.
        lengths: per sample, tokens in each decoder layer.
        vision_tokens: of the batch.
        answers: tokens with a label.
        dtype: of activations.
        checkpointing: decoder layers are recomputed in the backward pass.
    """
    tensors = [*module.parameters(), *module.buffers()]
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    activations = flops = None
    config: Any = parts.model.config
    if has_formula(config):
        text = parts.text_config
        widest = [max(layer) * len(lengths) for layer in zip(*lengths, strict=True)]  # tokens of a padded layer
        values = [_values_per_token(layer) for layer in layer_configs(text)]
        each = [tokens * value for tokens, value in zip(widest, values, strict=True)]
        kept = sum(widest) * text.hidden_size + max(each) if checkpointing else sum(each)
        activations = kept * dtype.itemsize + 2 * 4 * answers * text.vocab_size
        patches = vision_tokens * (parts.family.patches_per_token(config) or 1)
        tower = 2 * sum(p.numel() for p in parts.vision_tower.parameters()) * patches
        whole = [p for p in parts.language_model.parameters() if p.requires_grad and p.ndim > 1]
        all_weights = sum(p.numel() for p in parts.language_model.parameters() if p.ndim > 1)
        passes = 2 + checkpointing + (sum(p.numel() for p in whole) > all_weights / 2)
        flops = passes * sum(decoder_flops(config, sample, 0) for sample in lengths) + tower
        flops += 3 * 2 * answers * text.hidden_size * text.vocab_size
    size = sum(t.numel() * t.element_size() for t in tensors)
    return Estimate(size, trained, 2 * trained, activations, flops)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a matrix product on a device: what a step reaches at best."""
    a = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX**3 / best


def device_memory(device: torch.device) -> tuple[int | None, str]:
    """Bytes of memory of a device, and its name; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, f"of {device}"
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of host memory"
    except (ValueError, OSError, AttributeError):  # not on every system
        return None, "of host memory"


def _values_per_token(layer: Any) -> int:
    query = head_size(layer) * layer.num_attention_heads
    return 4 * layer.hidden_size + 2 * (query + key_width(layer)) + 3 * layer.intermediate_size


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
