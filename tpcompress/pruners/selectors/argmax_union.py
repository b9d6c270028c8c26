"""Argmax union: each token votes for one token, and tokens with a vote are retained.

B rows, V tokens: rows of a V x V matrix vote, columns are voted for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.gate_components import Choice, Scores, Selector
from tpcompress.pruners.selectors.gumbel_topk import gumbel_noise
from tpcompress.pruners.selectors.relaxations import straight_through
from tpcompress.pruners.selectors.threshold import within

NOISES = ("gumbel", "uniform")


class ArgmaxUnion(Selector):
    """keep = { v : v = argmax_w (A_uw + c e_uw) for some u };     A = `Scores.votes_BVV`, e noise, c = 1 - progress.

    gate = keep + m - sg(m), m_v = 1 - prod_u (1 - p_uv), p_u = softmax_w(A_uw + c e_uw): the probability that v has a
    vote. Noise only when exploring: `gumbel` as the paper says, or `uniform` in [0, 1) as its code does. At most `cap`
    k tokens stay (`cap: null` for no limit): those with most votes, of equal ones those of the higher score.

    needs  a scorer that gives votes.     gives  keep_BV; exploring also gate_BV, 0 or 1 forward, and expected_B = the
    sum of m.
    Source: LightVLA (2509.12594). Its training puts, at the place of each voter, the token that it voted for: a
    sequence of full length with duplicates, which inference then drops. Here both have the set. The cap is ours.
    Cost: V x V votes, V x V noise; it chooses its own count, read by one host-device sync.
    """

    name = "argmax_union"
    exact_count = False
    votes = True
    test_arguments = (
        {"noise": "uniform"},
        {"cap": None},
    )

    def __init__(self, noise: str = "gumbel", cap: float | None = 1.0) -> None:
        super().__init__()
        if noise not in NOISES:
            raise ValueError(f"argmax_union has no noise '{noise}'; choose one of {', '.join(NOISES)}.")
        if cap is not None and cap <= 0:
            raise ValueError(f"argmax_union needs a positive cap, a multiple of the budget, or null; got {cap}.")
        self.noise, self.cap = noise, cap

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        if scores.votes_BVV is None:
            raise ValueError(
                "argmax_union counts votes, this scorer gives none; take cross_attention with union: true."
            )
        votes_BVV = scores.votes_BVV
        if explore:
            draw_BVV = gumbel_noise(votes_BVV) if self.noise == "gumbel" else torch.rand_like(votes_BVV)
            votes_BVV = votes_BVV + (1 - self.progress) * draw_BVV
        votes_BVV = votes_BVV.masked_fill(~valid_BV[:, None], torch.finfo(votes_BVV.dtype).min)
        ballots_BV = ballots(votes_BVV.detach(), valid_BV)
        keep_BV = ballots_BV > 0
        if self.cap is not None:
            # Counts first; a score in (0, 1) tells apart those of one count.
            order_BV = ballots_BV + torch.sigmoid(scores.scores_BV.detach())
            keep_BV = within(keep_BV, order_BV, valid_BV, num_keep_B, 0.0, self.cap)
        if not explore:
            return Choice(keep_BV, scores.scores_BV)
        any_BV = any_vote(votes_BVV.softmax(-1), valid_BV)
        return Choice(keep_BV, scores.scores_BV, straight_through(keep_BV, any_BV), expected_B=any_BV.sum(1))


def ballots(votes_BVV: Tensor, valid_BV: Tensor) -> Tensor:
    """fp32 (B, V): how many valid tokens vote for each one; of equal votes the earlier token gets it."""
    return torch.zeros_like(votes_BVV[:, 0]).scatter_add(1, votes_BVV.argmax(-1), valid_BV.to(votes_BVV.dtype))


def any_vote(share_BVV: Tensor, valid_BV: Tensor) -> Tensor:
    """1 - prod_u (1 - p_uv), fp32 (B, V), over the valid voters u; 0 on padding."""
    # Short of 1, where one sure voter would hide all others from the gradient as 0 / 0.
    none_BVV = torch.log1p(-share_BVV.clamp(max=1 - 1e-6)).masked_fill(~valid_BV[..., None], 0.0)
    return (-torch.expm1(none_BVV.sum(1))).masked_fill(~valid_BV, 0.0)
