"""Builds the `TokenView` of a stage: only what its pruner `needs`, and nothing twice.

B samples, N columns, R budget rows, V vision tokens, H query heads, G key heads, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompress.families import rotary_of
from tpcompress.insertion.sequence import Frame, Rows, get_tokens
from tpcompress.pruners import Pruner, TokenView

LAYER_VIEWS = frozenset({"keys", "attention"})
"""Views of the layer before the stage: they do not exist before the language model."""


@dataclass
class LayerInput:
    """What one decoder layer was called with; its queries and keys are recomputed from this, at most once."""

    layer: Any
    hidden_BND: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Any
    memo: dict[str, Tensor] = field(default_factory=dict)

    def keys(self) -> Tensor:
        """Keys of all columns after rotary embedding (B, G, N, d)."""
        if "keys" not in self.memo:
            attention = self.layer.self_attn
            key_BGNd = _heads(attention, "k", self._normed())
            self.memo["keys"] = rotary_of(attention)(key_BGNd, key_BGNd, *self.rotary)[1]
        return self.memo["keys"]

    def attention(self, query_B: Tensor, padding_BN: Tensor | None) -> Tensor:
        """Attention of one query column per sample to every column, fp32 (B, H, N): softmax(q k / sqrt(d))."""
        attention = self.layer.self_attn
        batch_B = torch.arange(len(query_B), device=query_B.device)
        query_BHNd = _heads(attention, "q", self._normed()[batch_B, query_B][:, None])
        cos, sin = (x.expand(len(query_B), -1, -1)[batch_B, query_B][:, None] for x in self.rotary)
        query_BH1d = rotary_of(attention)(query_BHNd, query_BHNd, cos, sin)[0]
        key_BGNd = self.keys()
        repeat = query_BH1d.shape[1] // key_BGNd.shape[1]
        logits_BHN = (query_BH1d @ key_BGNd.repeat_interleave(repeat, 1).mT)[:, :, 0].float() * attention.scaling
        seen_BN = torch.arange(key_BGNd.shape[2], device=query_B.device) <= query_B[:, None]
        if padding_BN is not None:
            seen_BN = seen_BN & padding_BN
        if isinstance(self.mask, Tensor) and self.mask.ndim == 4 and self.mask.shape[-1] == seen_BN.shape[1]:
            row_BN = self.mask.expand(len(query_B), -1, -1, -1)[batch_B, 0, query_B]
            seen_BN = seen_BN & (row_BN if row_BN.dtype == torch.bool else row_BN >= 0)
        return logits_BHN.masked_fill(~seen_BN[:, None], -torch.inf).softmax(-1)

    def _normed(self) -> Tensor:
        if "normed" not in self.memo:
            self.memo["normed"] = self.layer.input_layernorm(self.hidden_BND)
        return self.memo["normed"]


def build_view(
    pruner: Pruner,
    rows: Rows,
    frame: Frame,
    hidden_BND: Tensor,
    padding_BN: Tensor | None,
    last_prompt_B: Tensor,
    before: LayerInput | None,
    soft: bool,
) -> tuple[TokenView, Tensor]:
    """What a pruner may look at, and the flat columns (R, V) of the tokens that it judges.

    Args:
        pruner: its `needs` decide what is built.
        rows: vision tokens still in the sequence.
        frame: the sequence at hand.
        hidden_BND: hidden states at the stage.
        padding_BN: True on real columns; None if all are.
        last_prompt_B: column of the last prompt token of each sample: nothing after it is ever shown.
        before: the layer before the stage; None before the language model.
        soft: see `TokenView.soft`.
    """
    cell_RV = frame.cells(rows)
    vision_RVD = get_tokens(hidden_BND, cell_RV)
    optional: dict[str, Tensor] = {}
    if "text" in pruner.needs:
        optional["text_BSD"] = hidden_BND[rows.owner_R]
        optional["text_valid_BS"] = _question(rows, cell_RV, frame, padding_BN, last_prompt_B)
    with torch.no_grad():
        if "keys" in pruner.needs:
            assert before is not None
            key_BNd = before.keys().transpose(1, 2).flatten(2)
            optional["keys_BVD"] = get_tokens(key_BNd, cell_RV)
            optional["text_keys_BSD"] = key_BNd[rows.owner_R]
        if "attention" in pruner.needs:
            assert before is not None
            weight_BHN = before.attention(last_prompt_B, padding_BN)
            column_RV = cell_RV - rows.owner_R[:, None] * frame.width
            index_RHV = column_RV[:, None].expand(-1, weight_BHN.shape[1], -1)
            optional["attention_BHV"] = weight_BHN[rows.owner_R].gather(2, index_RHV)
    view = TokenView(
        vision_BVD=vision_RVD,
        valid_BV=rows.valid_RV,
        row_BV=rows.table_RV4[..., 0],
        col_BV=rows.table_RV4[..., 1],
        canvas=rows.canvas,
        soft=soft,
        **optional,
    )
    return view, cell_RV


def _question(rows: Rows, cell_RV: Tensor, frame: Frame, padding_BN: Tensor | None, last_prompt_B: Tensor) -> Tensor:
    """Prompt text after each row's last vision token; all prompt text if the image comes last (R, N)."""
    column_N = torch.arange(frame.width, device=cell_RV.device)
    text_RN = torch.ones(len(rows.owner), frame.width, dtype=torch.bool, device=cell_RV.device)
    column_RV = (cell_RV - rows.owner_R[:, None] * frame.width).masked_fill(~rows.valid_RV, -1)
    vision_BN = torch.zeros_like(frame.index_BN, dtype=torch.bool).view(-1)
    trash_RV = cell_RV.masked_fill(~rows.valid_RV, vision_BN.numel())
    vision_BN = torch.cat([vision_BN, vision_BN.new_zeros(1)]).scatter(0, trash_RV.reshape(-1), True)[:-1]
    text_RN &= ~vision_BN.view_as(frame.index_BN)[rows.owner_R]
    text_RN &= column_N <= last_prompt_B[rows.owner_R][:, None]
    if padding_BN is not None:
        text_RN &= padding_BN[rows.owner_R]
    after_RN = text_RN & (column_N > column_RV.amax(1, keepdim=True))
    return torch.where(after_RN.any(1, keepdim=True), after_RN, text_RN)


def _heads(attention: Any, name: str, x_BND: Tensor) -> Tensor:
    """One projection of an attention module, split into heads and normalised as the module does (B, heads, N, d)."""
    out = attention.get_submodule(f"{name}_proj")(x_BND).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (norm(out) if norm is not None else out).transpose(1, 2)
