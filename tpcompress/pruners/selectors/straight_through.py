"""Straight through: the hard top-k forward, the soft one backward."""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.parts import Choice, Scores
from tpcompress.pruners.selectors.annealed import Annealed
from tpcompress.pruners.selectors.soft_topk import known_relaxation, soft_topk, straight_through
from tpcompress.pruners.topk import keep_topk


class StraightThrough(Annealed):
    """gate = hard + m - sg(m);     hard = top-k of s, m = soft_topk(s / T, k).

    Forward it is the choice of inference, bit for bit; every token, dropped ones too, has the gradient of its soft
    weight. At full length this trains a scorer from scratch. On cut sequences only retained tokens receive a gradient
    of the model, and a scorer without knowledge then learns to drop what is needed: train it at full length first, or
    in one step of some.

    gives  keep_BV; exploring also gate_BV, 0 or 1 forward.
    Cost: that of `soft_topk`.
    """

    name = "straight_through"

    def __init__(
        self, relaxation: str = "sigmoid", temperature_start: float = 0.5, temperature_end: float = 0.1
    ) -> None:
        super().__init__(temperature_start, temperature_end)
        self.relaxation = known_relaxation(self.name, relaxation)

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        keep_BV = keep_topk(scores.scores_BV, valid_BV, num_keep_B)
        if not explore:
            return Choice(keep_BV, scores.scores_BV)
        soft_BV = soft_topk(scores.scores_BV / self.temperature, valid_BV, num_keep_B, self.relaxation)
        return Choice(keep_BV, scores.scores_BV, straight_through(keep_BV, soft_BV))
