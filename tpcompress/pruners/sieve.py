"""SIEVE: retain attended tokens that the text cannot reconstruct, of different residuals (arXiv 2608.10489)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import INSTRUCTION, Pruner, Selection, TokenView
from tpcompress.pruners.greedy import Criterion, cosines, first_picks, greedy, row_of

NOTHING = -1e9
"""Logarithm of a score of 0: below every other, and it stays so whatever is added."""


class SIEVE(Pruner):
    """Greedy argmax_i s_i with s_i = a_i^2 CMR_i^2; each pick p discounts the rest: s_j <- s_j (1 - cos(r_p, r_j)^2).

    r_i = v_i - v^_i is what a ridge regression on the text tokens leaves of token i: v^_i = v_i T' (T T' + lambda I)^-1
    T, all centred at the mean text token, lambda = the eigenvalue of T T' by which `energy` of their sum is reached;
    CMR_i = |r_i| / |v_i|. a_i = attention that the text tokens pay to token i, summed over them and over the `heads` of
    the attention heads that pay the vision tokens most. Words = those after the last vision token.

    needs  text, attention_prompt (so `layer` >= 1).
    gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last).
    Paper: energy = 0.75, 12 of 32 heads; 64 of LLaVA-1.5's 576 tokens at 11.1 %. It names no layers.
    Cost: the eigenvalues of T T' (CUDA's solver costs one host-device sync), one V x V Gram matrix, then V per pick.
    Unlike the official code: none was found. Unlike the paper: scores are kept as logarithms, so that hundreds of
    discounts cannot all end at 0; without any attention (a prompt without text tokens after the image) a = 1.
    """

    name = "sieve"
    paper = "2608.10489"
    group = "duplication and diversity"
    paper_plan = """
    # SIEVE: 64 of LLaVA-1.5's 576 tokens, attended and not explained by the words. The paper prunes at a few layers
    # and does not name them: here all at once, where FastV does.
    stages:
      - {pruner: sieve, layer: 2, keep_tokens: 64}
    """
    test_arguments = ({"energy": 1.0, "heads": 1.0},)

    def __init__(self, energy: float = 0.75, heads: float = 0.375) -> None:
        super().__init__()
        if not (0 < energy <= 1 and 0 < heads <= 1):
            raise ValueError(f"sieve needs energy and heads in (0, 1], got {energy} and {heads}.")
        self.energy, self.heads = energy, heads

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text", "attention_prompt"})

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.text_BSD is not None and tokens.prompt_column_BQ is not None
        assert tokens.attention_prompt_BHQV is not None and tokens.prompt_role_BQ is not None
        word_BQ = tokens.prompt_role_BQ == INSTRUCTION
        word_BQ = torch.where(word_BQ.any(1, keepdim=True), word_BQ, tokens.prompt_role_BQ > 0)
        column_BQ1 = tokens.prompt_column_BQ[..., None]
        text_BQD = tokens.text_BSD.gather(1, column_BQ1.expand(-1, -1, tokens.text_BSD.shape[2]))
        residual_BVD, share_BV = cross_modal_residual(tokens.vision_BVD, text_BQD, word_BQ, self.energy)
        paid_BV = word_attention(tokens.attention_prompt_BHQV, word_BQ, tokens.valid_BV, self.heads)
        order_BV = discounted(paid_BV * share_BV, cosines(residual_BVD), tokens.valid_BV, int(num_keep_B.max()))
        return first_picks(order_BV, tokens.valid_BV, num_keep_B)


def cross_modal_residual(
    vision_BVD: Tensor, text_BQD: Tensor, word_BQ: Tensor, energy: float = 0.75
) -> tuple[Tensor, Tensor]:
    """What the text tokens leave of each vision token, and its share of the token's length (CMR).

    Args:
        vision_BVD: hidden states of the vision tokens (B, V, D).
        text_BQD: hidden states of the prompt's text tokens.
        word_BQ: which of them count.
        energy: share of the eigenvalues' sum that sets the ridge.

    Returns:
        fp32 (B, V, D), and fp32 (B, V) in [0, 1]; 0 for a token that is the mean text token.
    """
    count_B11 = word_BQ.sum(1)[:, None, None].clamp(min=1)
    text_BQD = text_BQD.float().masked_fill(~word_BQ[..., None], 0.0)
    mean_B1D = text_BQD.sum(1, keepdim=True) / count_B11
    text_BQD = (text_BQD - mean_B1D).masked_fill(~word_BQ[..., None], 0.0)
    vision_BVD = vision_BVD.float() - mean_B1D
    gram_BQQ = text_BQD @ text_BQD.mT
    ridge_B = ridge(gram_BQQ, energy)
    factor_BQQ = torch.linalg.cholesky_ex(gram_BQQ + torch.diag_embed(ridge_B[:, None].expand_as(word_BQ))).L
    weight_BQV = torch.cholesky_solve(text_BQD @ vision_BVD.mT, factor_BQQ)
    residual_BVD = vision_BVD - weight_BQV.mT @ text_BQD
    length_BV = vision_BVD.norm(dim=-1)
    return residual_BVD, (residual_BVD.norm(dim=-1) / length_BV.clamp(min=1e-30)).clamp(max=1)


def ridge(gram_BQQ: Tensor, energy: float) -> Tensor:
    """The eigenvalue, from the largest down, by which `energy` of their sum is reached, plus 1e-6: fp32 (B,).

    Not below a millionth of the largest, where fp32 could not factorise.
    """
    value_BQ = torch.linalg.eigvalsh(gram_BQQ).flip(1).clamp(min=0)
    reached_BQ = value_BQ.cumsum(1) >= energy * value_BQ.sum(1, keepdim=True) * (1 - 1e-6)
    chosen_B = value_BQ.gather(1, reached_BQ.int().argmax(1, keepdim=True))[:, 0]
    return chosen_B.maximum(1e-6 * value_BQ[:, 0]) + 1e-6


def word_attention(attention_BHQV: Tensor, word_BQ: Tensor, valid_BV: Tensor, heads: float = 0.375) -> Tensor:
    """Attention of the text tokens to each vision token, summed over text tokens and over the heads that look there
    most.

    Args:
        attention_BHQV: attention of the text tokens of the prompt (B, H, Q, V).
        word_BQ: which of them count.
        valid_BV: bool (B, V).
        heads: share of the heads, at least one.

    Returns:
        fp32 (B, V); 1 throughout a row whose text tokens pay none.
    """
    H = attention_BHQV.shape[1]
    # In fp64 and no product of matrices, so that neither padding nor the batch separates equal tokens.
    said_BHQV = attention_BHQV.float().masked_fill(~word_BQ[:, None, :, None], 0.0)
    paid_BHV = said_BHQV.sum(2, dtype=torch.float64).float()
    paid_BHV = paid_BHV.masked_fill(~valid_BV[:, None], 0.0)
    # In steps that rounding cannot reach: heads that look there alike stay in their order, whatever the padding.
    mass_BH = (paid_BHV.sum(-1) / word_BQ.sum(1, keepdim=True).clamp(min=1) * 2**16).round()
    top_BH = mass_BH.argsort(dim=1, descending=True, stable=True)[:, : max(1, round(heads * H))]
    paid_BV = paid_BHV.gather(1, top_BH[..., None].expand(-1, -1, paid_BHV.shape[2])).sum(1)
    return torch.where(paid_BV.sum(1, keepdim=True) > 0, paid_BV, 1.0)


def discounted(score_BV: Tensor, similar_BVV: Tensor, valid_BV: Tensor, num_picks: int) -> Tensor:
    """Order of the greedy picks by score^2, where each pick p multiplies that of the rest by 1 - s(p, j)^2.

    Args:
        score_BV: at least 0 (B, V).
        similar_BVV: s in [-1, 1], fp32 (B, V, V).
        valid_BV: bool (B, V).
        num_picks: how many picks to make.

    Returns:
        int64 (B, V): 0 for the first pick, ...; V for tokens never picked. Ties: the earlier token.
    """
    return greedy(_Discount(score_BV, similar_BVV), valid_BV, num_picks)


class _Discount(Criterion):
    """Logarithm of the discounted score."""

    def __init__(self, score_BV: Tensor, similar_BVV: Tensor) -> None:
        self.similar_BVV, self.log_BV = similar_BVV, 2 * _log(score_BV)

    def score(self, open_BV: Tensor) -> Tensor:
        return self.log_BV

    def take(self, pick_B1: Tensor) -> None:
        self.log_BV = self.log_BV + _log(1 - row_of(self.similar_BVV, pick_B1).square())


def _log(x: Tensor) -> Tensor:
    return torch.where(x > 0, x.clamp(min=torch.finfo(torch.float32).tiny).log(), NOTHING)
