"""Distillation by KL: the student's answers have the teacher's distribution, not only its words.

A answer tokens, C vocabulary, T tokens that a cache holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp
from tpcompress.training.passes import Pass


def kl_divergence(log_p_AC: Tensor, log_q_AC: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), mean over rows."""
    return (log_p_AC.exp() * (log_p_AC - log_q_AC)).sum(-1).mean()


def kl_to_teacher(student_AC: Tensor, teacher_AC: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over answer tokens, fp32 (arXiv 1503.02531, section 2)."""
    log_q_AC, log_p_AC = ((x.float() / temperature).log_softmax(-1) for x in (student_AC, teacher_AC.detach()))
    return kl_divergence(log_p_AC, log_q_AC) * temperature**2


def aligned(here: Pass, taught: Pass, temperature: float, own: bool = False) -> tuple[Tensor, Tensor]:
    """Log probabilities of student and teacher over the same outcomes, fp32.

    The outcomes are the vocabulary. Against a cached teacher they are its T tokens and, at temperature 1, one more
    that stands for all others: a KL over them is at most that over the vocabulary, and less by no more than what the
    two disagree about within the rest. At other temperatures the rest is unknown, and both sides are conditioned on
    the T tokens.

    Args:
        here: the student.
        taught: the teacher, over the same answer tokens.
        temperature: divides the logits of both.
        own: at the answer tokens themselves instead of before them.

    Raises:
        ValueError: the logits asked for are not there, as a cache has none at the answer tokens.
    """
    if own:
        if here.own_AC is None or taught.own_AC is None:
            raise ValueError("KL with shifted: false needs logits that a cached teacher does not have; take another.")
        return _log_softmax(here.own_AC, temperature), _log_softmax(taught.own_AC, temperature)
    index_AT = taught.top_indices_AT
    if index_AT is None:
        return _log_softmax(here.logits_AC, temperature), _log_softmax(taught.logits_AC, temperature)
    if temperature != 1:
        student_AT = here.logits_AC.gather(1, index_AT)
        return _log_softmax(student_AT, temperature), _log_softmax(taught.logits_AC, temperature)
    assert taught.tail_A is not None
    log_q_AC = _log_softmax(here.logits_AC, 1.0)
    rest_A = log_q_AC.scatter(1, index_AT, -torch.inf).logsumexp(1)
    log_q_AK = torch.cat([log_q_AC.gather(1, index_AT), rest_A[:, None]], 1)
    return log_q_AK, torch.cat([taught.logits_AC, taught.tail_A[:, None]], 1).float()


class KL(Loss):
    """T^2 KL(teacher || student) on the answer tokens, mean over them (arXiv 1503.02531, section 2).

    The pruned student is shorter than its teacher. Text is never dropped, so the answer tokens are the same ones in
    the same order.

    Args:
        temperature: softens both sides.
        shifted: compare the logits that predict each answer token. `false` takes those at the tokens themselves, as
            the code of EPIC does (arXiv 2510.00515): the first answer token is then never distilled, and what follows
            the last one is. It also computes logits for the whole sequence.
        weight: of the term.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    name = "kl"

    def __init__(self, temperature: float = 1.0, shifted: bool = True, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        self.temperature, self.shifted = checked_temperature(temperature, self.name), shifted

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher"} if self.shifted else {"teacher", "own"})

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        if taught is None or not len(here.targets_A):
            return None
        log_q_AC, log_p_AC = aligned(here, taught, self.temperature, own=not self.shifted)
        return kl_divergence(log_p_AC.detach(), log_q_AC) * self.temperature**2


def checked_temperature(temperature: float, name: str) -> float:
    """The temperature.

    Raises:
        ValueError: it is not above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"Loss '{name}' has temperature {temperature}; give a number above 0, such as 1.0.")
    return temperature


def _log_softmax(logits_AC: Tensor, temperature: float) -> Tensor:
    return (logits_AC.float() / temperature).log_softmax(-1)
