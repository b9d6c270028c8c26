"""Cross-attention: what each vision token reads in the prompt becomes a query, and the mean query rates all tokens.

B rows, V vision tokens, S sequence length, D hidden size, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.scorers.weighted import WeightedScorer, masked_mean, spread


class CrossAttention(WeightedScorer):
    """score_u = mean_v vote_vu, with the votes of LightVLA after four learned projections.

        x, t = rms(vision), rms(text tokens)
        g_v     = sum_w softmax_w(A x_v . K t_w / sqrt(W)) R t_w          what token v reads in the prompt
        vote_vu = rms(g_v) . P x_u / sqrt(W)                              how it rates token u

    The mean over v goes inside, so without `union` no V x V matrix exists. With it, `Scores.votes_BVV` has all votes,
    for a selector that retains every token which some token rates highest.

    needs  text.     Source: LightVLA (arXiv 2509.12594), query generation and token scoring.
    Cost: O((V + S) D W + V S W); `union` adds V^2 W.
    Starts: A, K, R and P are equal (random, or the identity at full width), so a fresh scorer is LightVLA's own rule
    up to a random projection. Equal tokens are ranked by `spread`; so are all tokens if the prompt has no text token.
    Unlike the paper: it has no weights (here they make a rule that can imitate others), and its choice is the union.

    Args:
        width: W; null is the hidden size.
        union: give the votes, too.

    Raises:
        ValueError: the width is none.
    """

    name = "cross_attention"
    test_arguments = (
        {"width": None},
        {"width": 6, "union": True},
    )

    def __init__(self, width: int | None = 128, union: bool = False) -> None:
        super().__init__()
        if width is not None and width < 1:
            raise ValueError(f"cross_attention needs width >= 1, got {width}; null is the hidden size.")
        self.width, self.union = width, union

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text"})

    def make(self, hidden_size: int) -> None:
        width = self.width or hidden_size
        random_WD = torch.randn(width, hidden_size) * hidden_size**-0.5
        start_WD = random_WD if self.width else torch.eye(hidden_size)
        self.ask, self.word, self.read, self.rated = (nn.Linear(hidden_size, width, bias=False) for _ in range(4))
        for layer in (self.ask, self.word, self.read, self.rated):
            layer.weight = nn.Parameter(start_WD.clone())

    def rate(self, tokens: TokenView) -> Scores:
        assert tokens.text_BSD is not None and tokens.text_valid_BS is not None
        vision_BVD, text_BSD = _normed(tokens.vision_BVD.to(self.dtype)), _normed(tokens.text_BSD.to(self.dtype))
        query_BVW = prompt_queries(self.ask(vision_BVD), self.word(text_BSD), self.read(text_BSD), tokens.text_valid_BS)
        rated_BVW, tie_BV = self.rated(vision_BVD), spread(tokens.valid_BV)
        scale = query_BVW.shape[-1] ** -0.5
        scores_BV = (masked_mean(query_BVW, tokens.valid_BV) * rated_BVW).sum(-1) * scale + tie_BV
        votes_BVV = query_BVW @ rated_BVW.mT * scale + tie_BV[:, None] if self.union else None
        return Scores(scores_BV, votes_BVV=votes_BVV)


def prompt_queries(ask_BVW: Tensor, word_BSW: Tensor, read_BSW: Tensor, text_BS: Tensor) -> Tensor:
    """Attention output of each token over the prompt's text, scaled to root mean square 1 (B, V, W); 0 without text."""
    logits_BVS = ask_BVW @ word_BSW.mT * ask_BVW.shape[-1] ** -0.5
    weight_BVS = logits_BVS.masked_fill(~text_BS[:, None], -1e4).softmax(-1).masked_fill(~text_BS[:, None], 0.0)
    # Padding may hold any number, also one that is not: 0 times it would not be 0.
    return _normed(weight_BVS @ read_BSW.masked_fill(~text_BS[..., None], 0.0))


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)
