"""Soft top-k: weights that sum to the budget exactly, smooth in the scores.

B rows, V tokens.
"""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.gate_components import Choice, Scores
from tpcompress.pruners.selectors.annealed import Annealed
from tpcompress.pruners.selectors.relaxations import known_relaxation, soft_topk
from tpcompress.pruners.topk import keep_topk


class SoftTopK(Annealed):
    """m = F(s / T + t) with t such that sum(m) = k;     keep = top-k of s.

    F is the distribution function of `relaxation`: `sigmoid` 1 / (1 + e^-x), t by bisection, or `laplace` (e^x / 2
    below 0, 1 - e^-x / 2 above), t in closed form. T falls from `temperature_start` to `temperature_end`.

    gives  keep_BV; exploring also gate_BV = m, which is smooth forward and backward.
    Source: sigmoid as in VisionSelector (arXiv 2510.16598), there without a temperature and over the packed batch, here
    per row; laplace is LapSum. Cost: 40 passes over V, or one sort of V.
    """

    name = "soft_topk"
    test_arguments = ({"relaxation": "laplace"},)

    def __init__(
        self, relaxation: str = "sigmoid", temperature_start: float = 0.5, temperature_end: float = 0.1
    ) -> None:
        super().__init__(temperature_start, temperature_end)
        self.relaxation = known_relaxation(self.name, relaxation)

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        keep_BV = keep_topk(scores.scores_BV, valid_BV, num_keep_B)
        if not explore:
            return Choice(keep_BV, scores.scores_BV)
        gate_BV = soft_topk(scores.scores_BV / self.temperature, valid_BV, num_keep_B, self.relaxation)
        return Choice(keep_BV, scores.scores_BV, gate_BV)
