"""Recomputes queries, keys, values and attention of a layer from its input, with the layer's own code.

The layer runs once more as a shallow copy whose attention calls our function as its kernel, which stops it there. So
norms, fused projections, rotary embeddings and scales are those of the family, and the model keeps its attention
implementation.

B samples, N columns of the layer's input, L keys (those in the cache, too), H query heads, G key heads, d width of a
head, Q chosen queries.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tpcompress.insertion.gates import ARGUMENT, Gates
from tpcompress.insertion.kernel_config import KernelConfig

KERNEL = "tpcompress_look"
"""Attention implementation of a copied layer that stops at its kernel."""


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of an attention kernel.

    Attributes:
        query_BHNd, key_BGLd: after norms and rotary embedding.
        value_BGLd: the values.
        mask: the layer's mask: 4-D (bool, or added to the logits), 2-D (True on real keys) or None.
        scaling: factor of the logits.
        softcap: bound of the logits, or None.
        window: largest number of keys that a query attends to without a 4-D mask, or None.
        bias_BL: fp32, added to the logits of each key by gates in training, or None.
    """

    query_BHNd: Tensor
    key_BGLd: Tensor
    value_BGLd: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    window: int | None
    bias_BL: Tensor | None = None

    def logits(self, query_BHQd: Tensor, key_BGLd: Tensor) -> Tensor:
        """Logits (B, H, Q, L), fp32: scaled and capped, without the mask."""
        key_BHLd = key_BGLd.repeat_interleave(query_BHQd.shape[1] // key_BGLd.shape[1], 1)
        logits_BHQL = query_BHQd @ key_BHLd.mT * self.scaling
        if self.softcap is not None:
            logits_BHQL = torch.tanh(logits_BHQL / self.softcap) * self.softcap
        return logits_BHQL.float()


class _Stop(Exception):
    """Leaves a copied layer at its attention kernel."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs


def _stop(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> None:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    gates: Gates | None = kwargs.get(ARGUMENT)
    bias_BL = None if gates is None else gates.key_bias_BN
    raise _Stop(AttentionInputs(query, key, value, attention_mask, scaling, softcap, sliding_window, bias_BL))


AttentionInterface.register(KERNEL, _stop)


def run_to_kernel(layer: Any, attention: str, args: tuple, kwargs: Mapping[str, Any]) -> AttentionInputs:
    """Run a layer up to its attention kernel. Neither the layer nor a cache changes.

    Args:
        layer: a decoder layer, or a block of a vision tower.
        attention: attribute with its attention.
        args, kwargs: its arguments, without a cache.

    Raises:
        ValueError: the attention calls no kernel of transformers.
    """
    twin, inner = copy.copy(layer), copy.copy(getattr(layer, attention))
    inner.config = KernelConfig(inner.config, KERNEL)
    inner.__dict__.pop("forward", None)
    twin.__dict__["_modules"] = layer._modules | {attention: inner}
    twin.gradient_checkpointing = False
    try:
        type(layer).forward(twin, *args, **kwargs)
    except _Stop as stop:
        return stop.inputs
    raise ValueError(
        f"{type(layer).__name__} does not call an attention kernel of transformers, so its keys and attention cannot "
        f"be read; use a pruner that needs neither."
    )


@dataclass
class LayerProbe:
    """The input of one decoder layer, from which its queries, keys and values are recomputed, at most once.

    Attributes:
        layer: the decoder layer.
        index: its index.
        hidden_BND: its input.
        kwargs: its other arguments.
        memo: values that were computed before.
    """

    layer: Any
    index: int
    hidden_BND: Tensor
    kwargs: Mapping[str, Any]
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> AttentionInputs:
        """Queries, keys and values of the columns at hand; with shared keys, all keys that the layer reads."""
        if "inputs" not in self.memo:
            kwargs = dict(self.kwargs) | {"past_key_values": None}
            if kwargs.get("shared_kv_states") is not None:
                # Gemma 4: a layer may write its keys there, and these lack what the cache holds.
                kwargs["shared_kv_states"] = dict(kwargs["shared_kv_states"])
            self.memo["inputs"] = run_to_kernel(self.layer, "self_attn", (self.hidden_BND,), kwargs)
        return self.memo["inputs"]

    def keys(self) -> Tensor:
        """Keys of the columns at hand after rotary embedding (B, G, N, d)."""
        return self.inputs.key_BGLd[:, :, -self.hidden_BND.shape[1] :]

    def values(self) -> Tensor:
        """Values of the columns at hand (B, G, N, d)."""
        return self.inputs.value_BGLd[:, :, -self.hidden_BND.shape[1] :]

    def attention(self, query_BQ: Tensor, held: int) -> Tensor:
        """Attention of chosen columns to the columns at hand, fp32 (B, H, Q, N), as in the eager kernel.

        Args:
            query_BQ: int64, columns.
            held: columns that the layer's cache held before this call; they take part in the softmax.

        Raises:
            ValueError: the cache no longer holds some of them.
        """
        inputs, N = self.inputs, self.hidden_BND.shape[1]
        index_BHQd = query_BQ[:, None, :, None].expand(-1, inputs.query_BHNd.shape[1], -1, inputs.query_BHNd.shape[-1])
        logits_BHQL = inputs.logits(inputs.query_BHNd.gather(2, index_BHQd), self._all_keys(held))
        return self._masked(logits_BHQL, query_BQ, held).softmax(-1)[..., held : held + N]

    def _all_keys(self, held: int) -> Tensor:
        """Keys of the conversation before and of the columns at hand (B, G, L, d)."""
        key_BGLd, width = self.inputs.key_BGLd, held + self.hidden_BND.shape[1]
        if key_BGLd.shape[2] == width:  # nothing before, or shared keys
            return key_BGLd
        if "all keys" not in self.memo:
            cached = self.kwargs["past_key_values"].layers[self.index]
            if getattr(cached, "is_sliding", False):
                raise ValueError(
                    f"The cache of layer {self.index} forgets what a window passed; set layer after a layer of full "
                    f"attention, or use a pruner that needs no attention, to prune images of a continued conversation."
                )
            self.memo["all keys"] = torch.cat([cached.keys[:, :, :held].to(key_BGLd.dtype), key_BGLd], 2)
        return self.memo["all keys"]

    def _masked(self, logits_BHQL: Tensor, query_BQ: Tensor, held: int) -> Tensor:
        mask, width = self.inputs.mask, logits_BHQL.shape[-1]
        if self.inputs.bias_BL is not None:
            logits_BHQL = logits_BHQL + self.inputs.bias_BL[:, None, None]
        closed = torch.finfo(logits_BHQL.dtype).min
        if mask is not None and mask.ndim == 4:
            # A static cache has more columns than keys.
            mask_BHNL = mask.expand(len(query_BQ), -1, -1, -1)[..., :width]
            index_BHQL = query_BQ[:, None, :, None].expand(-1, mask_BHNL.shape[1], -1, width)
            mask_BHQL = mask_BHNL.gather(2, index_BHQL)
            if mask_BHQL.dtype != torch.bool:
                return logits_BHQL + mask_BHQL
            return logits_BHQL.masked_fill(~mask_BHQL, closed)
        column_L = torch.arange(width, device=query_BQ.device)
        seen_BQL = column_L <= held + query_BQ[..., None]
        if self.inputs.window is not None:
            seen_BQL &= column_L > held + query_BQ[..., None] - self.inputs.window
        if mask is not None:
            seen_BQL &= mask[:, None, :width].bool()
        return logits_BHQL.masked_fill(~seen_BQL[:, None], closed)
