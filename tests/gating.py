"""A pruner that gates attention, and a dense reference of it: a kernel of plain products and a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from reference import row_positions
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from tpcompress.families import resolve
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk

KERNEL = "tpcompress_dense_reference"


class Gating(Pruner):
    """Gates of any kind from the tokens' own features. Each test says which it wants.

    Args:
        value, bias: what it gates.
        smooth: whether it says so, in which case nothing is cut at full length.
        slope: how far gates are from 1 and biases from 0.
    """

    name = "gating"
    gates = True
    differentiable = True

    def __init__(self, value: bool = True, bias: bool = True, smooth: bool = True, slope: float = 2.0) -> None:
        super().__init__()
        self.value, self.bias, self.smooth, self.slope = value, bias, smooth, slope

    @property
    def learned(self) -> bool:
        return True

    def build(self, hidden_size: int) -> None:
        if not hasattr(self, "weight"):
            start = torch.randn(hidden_size, generator=torch.Generator().manual_seed(5)) * hidden_size**-0.5
            self.weight = torch.nn.Parameter(start)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        x_BVD = tokens.vision_BVD
        weight = self.weight.to(x_BVD.dtype)
        scores_BV = torch.nn.functional.normalize(x_BVD, dim=-1) @ weight * 8
        gate_BV = torch.sigmoid(self.slope * scores_BV)
        return Selection(
            keep_topk(scores_BV.detach(), tokens.valid_BV, num_keep_B),
            scores_BV,
            gate_BV=gate_BV if self.smooth else None,
            value_gate_BV=gate_BV if self.value else None,
            key_bias_BV=self.slope * scores_BV.tanh() if self.bias else None,
        )


def _dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None,
    softcap: float | None = None, told: dict[int, tuple[Tensor, Tensor]] | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    value_gate, key_bias = module.dense_reference
    logits = logits + attention_mask + key_bias[:, None, None].to(logits.dtype)
    out = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
    return (out @ (value * value_gate[:, None, :, None].to(value.dtype))).transpose(1, 2).contiguous(), None


AttentionInterface.register(KERNEL, _dense)
AttentionMaskInterface.register(KERNEL, eager_mask)


def columns(model: Any, inputs: dict[str, Any], stage: StageTrace, field: str, other: float) -> Tensor:
    """A field of a stage's selection at the columns of the whole sequence, if nothing was cut before it."""
    ids = inputs["input_ids"]
    found = torch.full(ids.shape, other, dtype=torch.promote_types(model.dtype, torch.float32))
    told = getattr(stage.selection, field, None)
    if told is not None:
        for r, row in enumerate(row_positions(ids, stage, resolve(model).placeholder_ids)):
            for v, (b, s) in enumerate(row):
                found[b, s] = told[r, v].detach()
    return found


@contextmanager
def dense(model: Any, inputs: dict[str, Any], trace: Trace, hide: bool = False) -> Iterator[None]:
    """An unattached model whose layers behind each stage have its gates, in dense masks.

    Args:
        model: with the weights of the attached one.
        inputs: of the call.
        trace: of the attached model's call; its stages saw all vision tokens.
        hide: whether tokens that the stages did not retain are out of sight, too.
    """
    parts = resolve(model)
    config = parts.text_config
    before = config._attn_implementation
    ones = torch.ones(inputs["input_ids"].shape)
    config._attn_implementation = KERNEL
    try:
        for index, layer in enumerate(parts.layers):
            gate, bias = ones, ones * 0
            for stage in trace.stages:
                if stage.layer <= index:
                    gate = gate * columns(model, inputs, stage, "value_gate_BV", 1.0)
                    bias = bias + columns(model, inputs, stage, "key_bias_BV", 0.0)
                    if hide:
                        bias = bias.masked_fill(columns(model, inputs, stage, "keep_BV", 1.0) == 0, -1e4)
            layer.self_attn.dense_reference = (gate, bias)
        yield
    finally:
        config._attn_implementation = before
        for layer in parts.layers:
            layer.self_attn.__dict__.pop("dense_reference", None)
