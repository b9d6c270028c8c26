"""Distillation by the Jensen-Shannon divergence, which is bounded, so single tokens do not dominate it.

A answer tokens, C vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp
from tpcompress.training.losses.kl import aligned, checked_temperature, kl_divergence
from tpcompress.training.passes import Pass


def jensen_shannon(log_p_AC: Tensor, log_q_AC: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, of each row (A,)."""
    log_m_AC = torch.logaddexp(log_p_AC + math.log(beta), log_q_AC + math.log(1 - beta))
    return beta * kl_divergence(log_p_AC, log_m_AC) + (1 - beta) * kl_divergence(log_q_AC, log_m_AC)


class JSD(Loss):
    """T^2 times the generalised Jensen-Shannon divergence of teacher p and student q (arXiv 2306.13649, section 2).

    At most log 2 per answer token for beta 0.5. Small beta acts like KL(p || q), large beta like KL(q || p).

    Args:
        beta: share of the teacher in the mixture, in (0, 1).
        temperature: softmax temperature of both distributions.
        weight: factor on the term.

    Raises:
        ValueError: a beta outside (0, 1), or a temperature that is not above 0.
    """

    name = "jsd"
    test_arguments = ({"beta": 0.3},)

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if not 0 < beta < 1:
            raise ValueError(f"Loss 'jsd' has beta {beta}; give a number between 0 and 1, or use KL for its limits.")
        self.beta, self.temperature = beta, checked_temperature(temperature, self.name)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        if teacher is None or not len(student.targets_A):
            return None
        log_q_AC, log_p_AC = aligned(student, teacher, self.temperature)
        return student.answer_mean(jensen_shannon(log_p_AC.detach(), log_q_AC, self.beta)) * self.temperature**2
