"""Learned budget: how much of its budget a stage spends is what is trained.

B rows, V tokens, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpcompress.pruners.gate_components import Choice, Scores
from tpcompress.pruners.selectors.annealed import Annealed
from tpcompress.pruners.selectors.relaxations import known_relaxation, soft_topk, straight_through
from tpcompress.pruners.topk import on, rank


class LearnedBudget(Annealed):
    """p = softmax(a) over C factors f of the budget;     K = ceil(sum_c p_c f_c k);     keep = top-K of s.

    A token of place r in the order of scores passes with probability q_r = sum of p_c over all c whose count exceeds r.
    gate = keep + q - sg(q) + m - sg(m): a learns through q, the scores through m = soft_topk(s / T, K). The factors
    lie evenly from 1 - `spread` to 1 + `spread`, at least one token and at most all; p starts even, so K starts at the
    budget. The gates alone increase the count without bound: add a loss on expected_B.

    gives  keep_BV with K tokens; exploring also gate_BV, 0 or 1 forward, and expected_B = K with the gradient of the
    sum. Under several stages of a plan the factors move tokens between layers.
    Source: DiffRate (2305.17997), section 3, whose candidates are all counts and whose scores learn nothing. m is ours.
    Cost: two sorts of V, V x C probabilities. K depends on a weight, so it is read by one host-device sync; a trained
    factor is written into a plan as its budget to be rid of that.
    """

    name = "learned_budget"
    exact_count = False
    test_arguments = ({"relaxation": "laplace", "spread": 0.5, "candidates": 5},)

    def __init__(
        self,
        spread: float = 0.75,
        candidates: int = 16,
        relaxation: str = "sigmoid",
        temperature_start: float = 0.5,
        temperature_end: float = 0.1,
    ) -> None:
        super().__init__(temperature_start, temperature_end)
        if not 0 < spread < 1 or candidates < 2:
            raise ValueError(
                f"learned_budget needs spread in (0, 1) and at least 2 candidates, got {spread} and {candidates}."
            )
        self.spread, self.candidates = spread, candidates
        self.relaxation = known_relaxation(self.name, relaxation)
        self.logits: nn.Parameter | None = None

    @property
    def learned(self) -> bool:
        return True

    def build(self, hidden_size: int) -> None:
        if self.logits is None:
            self.logits = nn.Parameter(torch.zeros(self.candidates))

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        assert self.logits is not None, "learned_budget has no weights yet: attach it to a model first"
        share_C = self.logits.float().softmax(0)
        count_BC = self.counts(valid_BV, num_keep_B)
        mean_B = (count_BC * share_C).sum(1)
        whole_B = round_up(mean_B.detach())
        place_BV = rank(scores.scores_BV, valid_BV)
        keep_BV = (place_BV < whole_B[:, None]) & valid_BV
        if not explore:
            return Choice(keep_BV, scores.scores_BV)
        pass_BV = prefix_probability(place_BV, count_BC, share_C).masked_fill(~valid_BV, 0.0)
        soft_BV = soft_topk(scores.scores_BV / self.temperature, valid_BV, whole_B, self.relaxation)
        gate_BV = straight_through(keep_BV, pass_BV) + (soft_BV - soft_BV.detach())
        return Choice(keep_BV, scores.scores_BV, gate_BV, expected_B=straight_through(whole_B, mean_B))

    def counts(self, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
        """fp32 (B, C): what each candidate retains of each row, from 1 to all of it, not rounded."""
        factor_C = torch.linspace(1 - self.spread, 1 + self.spread, self.candidates, device=valid_BV.device)
        count_B1 = valid_BV.sum(1, keepdim=True)
        return (on(num_keep_B, valid_BV)[:, None] * factor_C).clamp(min=1).minimum(count_B1)


def round_up(count: Tensor) -> Tensor:
    """The next whole number; a thousandth above one is that one, so that rounding alone costs no token."""
    return (count - 1e-3).ceil()


def prefix_probability(place_BV: Tensor, count_BC: Tensor, share_C: Tensor) -> Tensor:
    """Probability (B, V) that the token of a place is retained: the share of all candidates that reach after it."""
    reaches_BVC = place_BV[..., None] < round_up(count_BC)[:, None]
    return (reaches_BVC * share_C).sum(-1)
