"""Straight through: the hard top-k forward, the soft one backward."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tpcompress.pruners.gate_components import Choice, Scores
from tpcompress.pruners.selectors.relaxations import straight_through
from tpcompress.pruners.selectors.soft_topk import SoftTopK


class StraightThrough(SoftTopK):
    """gate = hard + m - sg(m);     hard = top-k of s, m = soft_topk(s / T, k).

    Forward it is the choice of inference, bit for bit; every token, dropped ones too, has the gradient of its soft
    weight. At full length this trains a scorer from scratch. On cut sequences only retained tokens receive a gradient
    of the model, and a scorer without knowledge then learns to drop what is needed: train it at full length first, or
    in one step of some.

    gives  keep_BV; exploring also gate_BV, 0 or 1 forward.
    Cost: that of `soft_topk`.
    """

    name = "straight_through"
    test_arguments = ({"relaxation": "laplace"},)

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        choice = super().forward(scores, valid_BV, num_keep_B, explore)
        if choice.gate_BV is None:
            return choice
        return replace(choice, gate_BV=straight_through(choice.keep_BV, choice.gate_BV))
