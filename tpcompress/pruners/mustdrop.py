"""MustDrop: what the tower attends to stays, the rest by the attention of text (arXiv 2411.10803)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import INSTRUCTION, Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, on
from tpcompress.pruners.tower_attention import SOURCES, check_share, check_source, saliency


class MustDrop(Pruner):
    """Key tokens: the ceil(`keys` V) of largest attention in the tower. Of the others, with A_tv the attention of text
    token t after the image, mean over heads,

    s_v = max(sum_t A_tv / (share sum_tu A_tu), max_t A_tv / peak).

    keep = the key tokens, then the largest s. With `threshold` all with s >= 1 besides the key tokens, whatever the
    budget: those that all text together or any single word attends to, as the paper has it.

    needs  attention_prompt, and tower_cls or tower_received by `attention` (nothing with keys 0).
    gives  keep_BV, scores_BV: key tokens above all others, else s / (1 + s).
    Paper: keys 0.08 of LLaVA-1.5's tokens by class attention in the tower's last layer; share and peak 0.001 for about
    192 tokens on average over layers, 0.011 and 0.01 for 64. V counts the tokens that reach the stage, so a later stage
    of a plan names a larger share for the same key tokens.
    Cost: attention of every prompt token in the layer before the stage, one sort of V.
    Unlike the official code: this is its filter in the language model; an exact budget without `threshold`; every image
    is judged by itself, and one without text after it by all text of the prompt. Its merge inside the tower is
    `window_merge`, which merges before the language model: no stage of this product shortens a tower, so the tower
    costs what it did. Not there: its output-aware cache, which takes the tokens that were dropped in the end out of the
    caches of earlier layers; here those keep what they saw.
    """

    name = "mustdrop"
    paper = "2411.10803"
    group = "attention in the language model"
    paper_plan = """
    # MustDrop at 65 of LLaVA-1.5's 576 tokens on average over layers: similar windows merge before the language model,
    # then four stages, in which the key tokens stay. The official counts follow from thresholds instead:
    # {type: mustdrop, threshold: true}
    stages:
      - {pruner: window_merge, layer: 0, keep_tokens: 300}
      - {pruner: mustdrop, layer: 3, keep_tokens: 110}  # 24 of 300 are key tokens
      - {pruner: {type: mustdrop, keys: 0.218}, layer: 7, keep_tokens: 54}
      - {pruner: {type: mustdrop, keys: 0.444}, layer: 11, keep_tokens: 32}
      - {pruner: {type: mustdrop, keys: 0.75}, layer: 15, keep_tokens: 24}
    """
    test_arguments = (
        {"keys": 0.3, "attention": "received"},
        {"keys": 0.0, "share": 1.0},
    )
    inexact_arguments = ({"threshold": True, "share": 0.2, "peak": 0.3},)

    def __init__(
        self,
        keys: float = 0.08,
        share: float = 0.011,
        peak: float = 0.01,
        threshold: bool = False,
        attention: str = "class",
        tower_layer: int = -1,
    ) -> None:
        super().__init__()
        check_share(self.name, "keys", keys)
        check_source(self.name, attention)
        for argument, value in (("share", share), ("peak", peak)):
            if not 0 < value <= 1:
                raise ValueError(f"mustdrop needs {argument} above 0 and at most 1, got {value}.")
        self.keys, self.share, self.peak, self.threshold = keys, share, peak, threshold
        self.attention, self.tower_layer = attention, tower_layer
        self.exact_count = not threshold

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention_prompt"} | ({SOURCES[self.attention]} if self.keys else set()))

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (self.tower_layer,)

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.attention_prompt_BHQV is not None and tokens.prompt_role_BQ is not None
        valid_BV = tokens.valid_BV
        scores_BV = dual_attention(tokens.attention_prompt_BHQV, tokens.prompt_role_BQ, valid_BV, self.share, self.peak)
        key_BV = torch.zeros_like(valid_BV)
        if self.keys:
            # A little less than the product, whose rounding must not add a token.
            num_B = (valid_BV.sum(1) * self.keys - 1e-4).ceil().long().clamp(min=1)
            attention_BV = saliency(tokens, self.attention)
            key_BV = keep_topk(attention_BV, valid_BV, num_B)
            scores_BV = torch.where(key_BV, 1 + attention_BV / (1 + attention_BV), scores_BV / (1 + scores_BV))
        else:
            scores_BV = scores_BV / (1 + scores_BV)
        if not self.threshold:
            return Selection(keep_topk(scores_BV, valid_BV, num_keep_B), scores_BV)
        best_BV = keep_topk(scores_BV, valid_BV, on(torch.ones_like(num_keep_B), scores_BV))
        return Selection((valid_BV & (scores_BV >= 0.5)) | best_BV, scores_BV)


def dual_attention(attention_BHQV: Tensor, role_BQ: Tensor, valid_BV: Tensor, share: float, peak: float) -> Tensor:
    """max(sum over text of attention / (share of all of it), largest attention / peak), fp32 (B, V).

    Args:
        attention_BHQV: attention of each text token of the prompt to each vision token.
        role_BQ: roles of the text tokens; those after the image are read, all of them in a row that has none.
        valid_BV: bool (B, V).
        share, peak: both above 0.
    """
    after_BQ = role_BQ == INSTRUCTION
    text_BQ = torch.where(after_BQ.any(1, keepdim=True), after_BQ, role_BQ > 0)
    mean_BQV = attention_BHQV.mean(1, dtype=torch.float64).float().masked_fill(~text_BQ[..., None], 0.0)
    mean_BQV = mean_BQV.masked_fill(~valid_BV[:, None], 0.0)
    sum_BV = mean_BQV.sum(1, dtype=torch.float64)
    total_B1 = sum_BV.sum(1, keepdim=True).clamp(min=1e-30)
    return (sum_BV / (share * total_B1)).float().maximum(mean_BQV.amax(1) / peak)
