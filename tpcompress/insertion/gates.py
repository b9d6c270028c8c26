"""Gates inside attention in training: multiply the values of vision tokens, and add to the logits of their keys.

A layer after the stage calls our kernel, which changes its arguments and calls the layer's own kernel. No dense mask is
made, so fused kernels stay in use. A bias b of a key becomes one more coordinate of each head:

    q' = [q, 1, 0 ..]    k' = [k, b / scaling, 0 ..]    v' = [g v, 0 ..]    scaling q' k' = scaling q k + b

Gates are arguments of each layer. Gradient checkpointing saves these, so a layer that is recomputed in the backward
pass, when the call is over, computes the same.

B samples, N columns, H query heads, G key heads, d width of a head.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tpcompress.families import Parts
from tpcompress.insertion.kernel_config import KernelConfig
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind
from tpcompress.insertion.shorten.sizes import add_log_sizes

KERNEL = "tpcompress_gated"
"""Attention implementation of a gated copy of an attention."""
ARGUMENT = "tpcompress_gates"
"""Argument of a layer that carries the gates to its attention."""
MULTIPLE = 8
"""Fused kernels require head widths that are multiples of this."""
WIDEST = 256
"""Widest head that flash attention supports."""


@dataclass(frozen=True, eq=False)
class Gates:
    """What the layers after a stage multiply and add.

    Attributes:
        value_gate_BN: fp32, multiplies the values of each column; None for 1.
        key_bias_BN: fp32, is added to the attention logits of each column's key; None for 0.
    """

    value_gate_BN: Tensor | None
    key_bias_BN: Tensor | None


class GatedAttention:
    """Replaces `forward` of an attention: with gates among its arguments it runs with our kernel, else unchanged."""

    def __init__(self, attention: nn.Module, previous: Any) -> None:
        self.attention, self.previous = attention, previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(ARGUMENT) is not None:
            return type(self.attention).forward(_gated_copy(self.attention), *args, **kwargs)
        kwargs.pop(ARGUMENT, None)
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.attention).forward(self.attention, *args, **kwargs)


def _gated_copy(attention: nn.Module) -> Any:
    """A shallow copy of an attention, with the same weights, that calls our kernel."""
    gated: Any = copy.copy(attention)
    gated.config = KernelConfig(attention.config, KERNEL)
    gated.__dict__["gated"] = attention
    return gated


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The layer's own kernel on gated values and biased keys."""
    gates: Gates = kwargs.pop(ARGUMENT)
    attention: nn.Module = module.gated
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel, width = _kernel(attention), value.shape[-1]
    if gates.value_gate_BN is not None:
        value = value * gates.value_gate_BN[:, None, :, None].to(value.dtype)
    if gates.key_bias_BN is not None and kwargs.get("softcap") is not None:
        # The cap must not apply to the bias; only eager attention caps here, and its mask is additive anyway.
        attention_mask = add_log_sizes(attention_mask, gates.key_bias_BN, query.dtype)
    elif gates.key_bias_BN is not None:
        query, key, value = _biased(query, key, value, gates.key_bias_BN / scaling)
    output, weights = kernel(attention, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output[..., :width], weights


AttentionInterface.register(KERNEL, _attend)


def _biased(query_BHNd: Tensor, key_BGNd: Tensor, value_BGNd: Tensor, bias_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the coordinate that adds a bias to the products, padded to a multiple of 8."""
    d = query_BHNd.shape[-1]
    width = -(-(d + 1) // MULTIPLE) * MULTIPLE
    one_BHN1 = query_BHNd.new_ones(1).expand(*query_BHNd.shape[:-1], 1)
    bias_BGN1 = bias_BN[:, None, :, None].to(key_BGNd.dtype).expand(*key_BGNd.shape[:-1], 1)
    query_BHNd = F.pad(torch.cat([query_BHNd, one_BHN1], -1), (0, width - d - 1))
    key_BGNd = F.pad(torch.cat([key_BGNd, bias_BGN1], -1), (0, width - d - 1))
    return query_BHNd, key_BGNd, F.pad(value_BGNd, (0, width - value_BGNd.shape[-1]))


def _kernel(attention: Any) -> Any:
    """The kernel that an attention calls without gates."""
    eager = inspect.unwrap(type(attention).forward).__globals__["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)


# ------------------------------------------------------------------------------------------- from stage to layers


def route_gates(
    hidden_BND: Tensor, value_gate_BN: Tensor | None, key_bias_BN: Tensor | None, layer: nn.Module
) -> tuple[Tensor, Gates | None]:
    """Gates for the layers after a stage, and the hidden states that go there.

    Reentrant checkpointing runs the backward pass of each layer separately. Each would run backward through the graph
    of the gates, which is freed after the first. So with checkpointing that is not known to be non-reentrant
    (`use_reentrant=False`), gates become leaves there, and the accumulated gradient of the leaves continues where the
    gradient of the hidden states passes the stage, after that of all layers.

    Args:
        hidden_BND: hidden states after the stage.
        value_gate_BN, key_bias_BN: gates of the columns; None without.
        layer: first decoder layer after the stage.

    Returns:
        The hidden states, and the gates, or None.
    """
    given = [x for x in (value_gate_BN, key_bias_BN) if x is not None]
    if not given:
        return hidden_BND, None
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in given) and _is_reentrant(layer)):
        return hidden_BND, Gates(value_gate_BN, key_bias_BN)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in given]
    handed: Tensor = _GateGradient.apply(hidden_BND, leaves, *given)  # type: ignore[no-untyped-call]
    rest = iter(leaves)
    return handed, Gates(*(None if x is None else next(rest) for x in (value_gate_BN, key_bias_BN)))


class _GateGradient(torch.autograd.Function):
    """Identity of the hidden states; its backward pass hands the gradients of the leaves to the gates."""

    @staticmethod
    def forward(ctx: Any, hidden_BND: Tensor, leaves: list[Tensor], *given: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden_BND.view_as(hidden_BND)

    @staticmethod
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return grad_BND, None, *found


def _is_reentrant(layer: Any) -> bool:
    """Whether a layer is checkpointed by a function that is not known to be non-reentrant."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    how = getattr(layer, "_gradient_checkpointing_func", None)
    return not (isinstance(how, functools.partial) and how.keywords.get("use_reentrant") is False)


# ------------------------------------------------------------------------------------------------------- checks


def check_gated(pruner: Any, gates: tuple[Tensor | None, Tensor | None], continued: bool) -> None:
    """Check that gates are from a pruner that declares them, in a call without a filled cache.

    Raises:
        ValueError: they are not.
    """
    if all(x is None for x in gates):
        return
    if not pruner.gates:
        raise ValueError(f"Pruner '{pruner.name}' gates attention; set its class attribute gates = True.")
    if continued:
        raise ValueError(
            "Gates act in training, on whole sequences, but this call continues a cache that holds tokens; call "
            "without past_key_values, or model.eval() first."
        )


def check_gates(parts: Parts, name: str, layer: int) -> None:
    """Check that gates of a pruner can act in every layer from a stage on.

    Raises:
        ValueError: they cannot.
    """
    config, reason = parts.text_config, None
    kinds = {layer_kind(config, index) for index in range(layer, len(parts.layers))}
    recurrent = [kind for kind in RECURRENT if kind in kinds]
    how = config._attn_implementation
    if recurrent:
        reason = f"layers of kind {recurrent[0]}, which have no keys; use a gate that acts on the input (noise)"
    elif not all(_takes_gates(module) for module in parts.layers[layer:]):
        reason = "layers that pass no arguments to a kernel of transformers; use a gate that acts on the input"
    elif how == "flex_attention":
        reason = "flex attention, whose kernels do not support such heads; load with attn_implementation='sdpa'"
    elif getattr(config, "attn_logit_softcapping", None) and how != "eager":
        reason = f"capped logits under {how}, which would cap the gates; load with attn_implementation='eager'"
    elif how.startswith("flash") and _head_width(parts, layer) + 1 > WIDEST:
        reason = f"heads of {_head_width(parts, layer)} under {how}, which supports at most {WIDEST}; use sdpa"
    if reason is not None:
        raise ValueError(f"Pruner '{name}' gates the attention of layers from {layer} on, but there are {reason}.")


def _takes_gates(layer: Any) -> bool:
    """Whether a layer passes arguments of any name to its attention, and that to a kernel of transformers."""
    attention = getattr(layer, "self_attn", None)
    if attention is None or not hasattr(attention, "config"):
        return False
    forwards = [inspect.unwrap(type(module).forward) for module in (layer, attention)]
    open_ended = [any(p.kind == p.VAR_KEYWORD for p in inspect.signature(f).parameters.values()) for f in forwards]
    return all(open_ended) and "eager_attention_forward" in forwards[1].__globals__


def _head_width(parts: Parts, layer: int) -> int:
    return max(int(module.self_attn.head_dim) for module in parts.layers[layer:])  # type: ignore[union-attr, arg-type]
