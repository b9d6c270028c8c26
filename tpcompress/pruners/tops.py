"""TOPS: retain tokens that are relevant, cover the rest and differ from each other (arXiv 2606.27161, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import INSTRUCTION, Pruner, Selection, TokenView
from tpcompress.pruners.greedy import Criterion, cosines, first_picks, greedy, on_host, row_of
from tpcompress.pruners.tower_attention import SOURCES, saliency

VIEWS = SOURCES | {"raters": "attention_prompt", "last": "attention"}
NORMS = ("minmax", "mean")


class TOPS(Pruner):
    """First argmax_i r_i, then argmax_i r~_i + coverage c~_i + diversity d~_i over the tokens i not yet picked.

    c_i = sum_j max(0, s(i, j) - max_{k in S} s(j, k)),   d_i = 1 - max_{k in S} s(i, k),   s = cosine of the tokens;
    ~ = stretched to [0, 1] over these tokens, anew for each pick (`normalise: mean` divides by their mean instead).
    r = relevance: before the language model, attention in the vision tower (`relevance: class`, or `received`);
    inside it, the mean over heads and raters of the attention that they pay (`raters`: the text tokens of the
    instruction that pay the vision tokens at least as much as such text tokens do on average), or that of the last
    prompt token (`last`).

    needs  tower_cls, tower_received, attention_prompt or attention, by relevance (the last two: layer >= 1).
    gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last).
    Paper: diversity = 0.5, and coverage = 0.5 before the language model; LLaVA-1.5-7B at 64: 576 -> 128 tokens there,
    64 at layer 12, 16 at layer 24 (coverage = 1.0 in both), compact positions.
    Cost: one V x V Gram matrix, then V x V work per pick; on a CPU V for each token that a pick covers better.
    Unlike the official code: none was found. Where the paper leaves it open: its section 4 stretches, its
    algorithms divide by the mean, neither says over which tokens (here: those that may still be picked); it gives no
    threshold for raters (here: the mean, as in SparseVLM).
    """

    name = "tops"
    paper = "2606.27161"
    group = "duplication and diversity"
    paper_plan = """
    # TOPS on 32 layers, the paper's 64 tokens of LLaVA-1.5-7B's 576: 128 before the language model, 64 and 16 inside
    # it.
    stages:
      - {pruner: tops, keep_tokens: 128}
      - {pruner: {type: tops, relevance: raters, coverage: 1.0}, layer: 12, keep_tokens: 64}  # coverage = lambda
      - {pruner: {type: tops, relevance: raters, coverage: 1.0}, layer: 24, keep_tokens: 16}
    positions: compact
    """
    test_arguments = (
        {"relevance": "raters", "coverage": 1.0},
        {"relevance": "last", "normalise": "mean"},
        {"relevance": "received", "diversity": 0.0},
    )

    def __init__(
        self, coverage: float = 0.5, diversity: float = 0.5, relevance: str = "class", normalise: str = "minmax"
    ) -> None:
        super().__init__()
        if not (coverage >= 0 and diversity >= 0):
            raise ValueError(f"tops needs weights of at least 0, got coverage {coverage} and diversity {diversity}.")
        if relevance not in VIEWS:
            raise ValueError(f"tops has no relevance '{relevance}'; choose one of {', '.join(VIEWS)}.")
        if normalise not in NORMS:
            raise ValueError(f"tops cannot normalise by '{normalise}'; choose one of {', '.join(NORMS)}.")
        self.coverage, self.diversity = coverage, diversity
        self.relevance, self.normalise = relevance, normalise

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({VIEWS[self.relevance]})

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        valid_BV = tokens.valid_BV
        order_BV = preservation_set(
            cosines(tokens.vision_BVD),
            self._relevance(tokens),
            valid_BV,
            int(num_keep_B.max()),
            self.coverage,
            self.diversity,
            self.normalise,
        )
        return first_picks(order_BV, valid_BV, num_keep_B)

    def _relevance(self, tokens: TokenView) -> Tensor:
        if self.relevance in SOURCES:
            return saliency(tokens, self.relevance)
        if self.relevance == "last":
            assert tokens.attention_BHV is not None
            return tokens.attention_BHV.float().mean(1)
        assert tokens.attention_prompt_BHQV is not None and tokens.prompt_role_BQ is not None
        return rater_attention(tokens.attention_prompt_BHQV, tokens.prompt_role_BQ, tokens.valid_BV)


def rater_attention(attention_BHQV: Tensor, role_BQ: Tensor, valid_BV: Tensor) -> Tensor:
    """Mean attention that each vision token gets from the raters, fp32 (B, V).

    Args:
        attention_BHQV: attention of the text tokens of the prompt (B, H, Q, V).
        role_BQ: their roles; raters are among those of the instruction, or among all text tokens of a prompt without
            one.
        valid_BV: bool (B, V).
    """
    attention_BQV = attention_BHQV.float().mean(1)
    word_BQ = role_BQ == INSTRUCTION
    word_BQ = torch.where(word_BQ.any(1, keepdim=True), word_BQ, role_BQ > 0)
    paid_BQ = attention_BQV.masked_fill(~valid_BV[:, None], 0.0).sum(-1).masked_fill(~word_BQ, 0.0)
    mean_B1 = paid_BQ.sum(1, keepdim=True) / word_BQ.sum(1, keepdim=True).clamp(min=1)
    # The slack keeps all of them if all pay alike.
    rater_BQ = word_BQ & (paid_BQ >= mean_B1 * (1 - 1e-6))
    # In fp64 and no product of matrices: `_stretched` would blow up what rounding makes of equal tokens.
    total_BV = attention_BQV.masked_fill(~rater_BQ[..., None], 0.0).sum(1, dtype=torch.float64).float()
    return total_BV / rater_BQ.sum(1, keepdim=True).clamp(min=1)


def preservation_set(
    similar_BVV: Tensor,
    relevance_BV: Tensor,
    valid_BV: Tensor,
    num_picks: int,
    coverage: float = 0.5,
    diversity: float = 0.5,
    normalise: str = "minmax",
) -> Tensor:
    """Order of the greedy picks by relevance, coverage gain and diversity.

    Args:
        similar_BVV: cosines, fp32 (B, V, V).
        relevance_BV: at least 0 (B, V).
        valid_BV: bool (B, V).
        num_picks: how many picks to make.
        coverage, diversity: weights of the two beside relevance.
        normalise: "minmax" or "mean", over the tokens that may still be picked.

    Returns:
        int64 (B, V): 0 for the first pick, ...; V for tokens never picked. Ties: the earlier token.
    """
    criterion = _Balance(similar_BVV, relevance_BV, valid_BV, coverage, diversity, normalise == "minmax")
    return greedy(criterion, valid_BV, num_picks)


class _Balance(Criterion):
    """Relevance, coverage gain and diversity, each brought to one scale over the tokens that may still be picked."""

    def __init__(
        self,
        similar_BVV: Tensor,
        relevance_BV: Tensor,
        valid_BV: Tensor,
        coverage: float,
        diversity: float,
        minmax: bool,
    ) -> None:
        self.similar_BVV, self.relevance_BV, self.valid_BV = similar_BVV, relevance_BV.float(), valid_BV
        self.coverage, self.diversity, self.minmax = coverage, diversity, minmax
        self.covered_BV: Tensor | None = None
        self.gain_BV = torch.zeros_like(similar_BVV[:, 0], dtype=torch.float64)

    def score(self, open_BV: Tensor) -> Tensor:
        if self.covered_BV is None:
            return self.relevance_BV
        scale = _stretched if self.minmax else _by_mean
        return (
            scale(self.relevance_BV, open_BV)
            + self.coverage * scale(self.gain_BV.float(), open_BV)
            + self.diversity * scale(1 - self.covered_BV, open_BV)
        )

    def take(self, pick_B1: Tensor) -> None:
        before_BV, row_BV = self.covered_BV, row_of(self.similar_BVV, pick_B1)
        self.covered_BV = row_BV if before_BV is None else before_BV.maximum(row_BV)
        if before_BV is None or not on_host(row_BV):
            more_BVV = (self.similar_BVV - self.covered_BV[:, None]).clamp_(min=0)
            self.gain_BV = more_BVV.masked_fill_(~self.valid_BV[:, None], 0.0).sum(-1, dtype=torch.float64)
            return
        # Few tokens are covered better by one more pick: only what is lost on these is looked at. In fp64, so that
        # many small losses leave no trace of rounding.
        better_V = ((self.covered_BV > before_BV) & self.valid_BV).any(0)
        index_M = torch.from_numpy(better_V.numpy().nonzero()[0])
        rows_BMV = self.similar_BVV.index_select(1, index_M)
        low_BM1, high_BM1 = (c_BV.index_select(1, index_M)[..., None] for c_BV in (before_BV, self.covered_BV))
        lost_BMV = torch.minimum(rows_BMV, high_BM1).sub_(low_BM1).clamp_(min=0)
        valid_BM1 = self.valid_BV.index_select(1, index_M)[..., None]
        self.gain_BV -= lost_BMV.masked_fill_(~valid_BM1, 0.0).sum(1, dtype=torch.float64)


def _stretched(x_BV: Tensor, open_BV: Tensor) -> Tensor:
    low_B1 = x_BV.masked_fill(~open_BV, torch.inf).amin(1, keepdim=True)
    high_B1 = x_BV.masked_fill(~open_BV, -torch.inf).amax(1, keepdim=True)
    return (x_BV - low_B1) / (high_B1 - low_B1).clamp(min=1e-12)


def _by_mean(x_BV: Tensor, open_BV: Tensor) -> Tensor:
    mean_B1 = x_BV.masked_fill(~open_BV, 0.0).sum(1, keepdim=True) / open_BV.sum(1, keepdim=True).clamp(min=1)
    return x_BV / mean_B1.clamp(min=1e-12)
