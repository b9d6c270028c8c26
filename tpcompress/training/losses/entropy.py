"""Entropy of gates or of scores.

R rows, V vision tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp, pruned_stages, stage_sum
from tpcompress.training.passes import Pass

OF = ("gate", "score")


def gate_entropy(gate_RV: Tensor) -> Tensor:
    """-m log m - (1 - m) log(1 - m) (R, V), in units of log 2: 0 for m in {0, 1}, 1 for m = 1/2."""
    # Away from 0 and 1, where the slope of the entropy is infinite.
    m_RV = gate_RV.float().clamp(1e-6, 1 - 1e-6)
    return (torch.special.entr(m_RV) + torch.special.entr(1 - m_RV)) / math.log(2)


def score_entropy(scores_RV: Tensor, valid_RV: Tensor) -> Tensor:
    """Entropy (R,) of softmax(scores) over the valid tokens, in units of log V: 1 if all scores are equal."""
    log_p_RV = scores_RV.float().masked_fill(~valid_RV, -1e4).log_softmax(1)
    entropy_R = -(log_p_RV.exp() * log_p_RV).masked_fill(~valid_RV, 0.0).sum(1)
    return entropy_R / valid_RV.sum(1).clamp(min=2).log()


class Entropy(Loss):
    """Entropy of the gates (mean over tokens) or of the softmax of the scores, mean over rows, summed over stages.

    Minimised, it makes the scores decided. With `spread` the entropy is maximised, which prevents early collapse.

    Args:
        of: `gate` or `score`.
        spread: maximise the entropy; the term is then its negative.
        weight: factor on the term.

    Raises:
        ValueError: unknown `of`.
    """

    name = "entropy"
    test_arguments = ({}, {"of": "score", "spread": True})

    def __init__(self, of: str = "gate", spread: bool = False, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if of not in OF:
            raise ValueError(f"Loss 'entropy' takes of: {' or '.join(OF)}, got {of!r}.")
        self.of, self.spread = of, spread

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        terms = []
        for stage in pruned_stages(student):
            if self.of == "gate" and stage.selection.gate_BV is not None:
                terms.append(stage.token_mean(gate_entropy(stage.gate_RV())))
            elif self.of == "score" and stage.selection.scores_BV.requires_grad:
                terms.append(stage.row_mean(score_entropy(stage.selection.scores_BV, stage.valid_RV)))
        total = stage_sum(terms)
        return -total if self.spread and total is not None else total
