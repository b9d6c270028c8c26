"""Distillation by KL divergence from the teacher's distribution over answer tokens.

A answer tokens, C vocabulary, T tokens stored by a cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp
from tpcompress.training.passes import Pass


def kl_divergence(log_p_AC: Tensor, log_q_AC: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) of each row (A,)."""
    return (log_p_AC.exp() * (log_p_AC - log_q_AC)).sum(-1)


def kl_to_teacher(student_AC: Tensor, teacher_AC: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over answer tokens, fp32 (arXiv 1503.02531, section 2)."""
    log_q_AC, log_p_AC = ((x.float() / temperature).log_softmax(-1) for x in (student_AC, teacher_AC.detach()))
    return kl_divergence(log_p_AC, log_q_AC).mean() * temperature**2


def aligned(student: Pass, teacher: Pass, temperature: float, own: bool = False) -> tuple[Tensor, Tensor]:
    """Log probabilities of student and teacher over the same outcomes, fp32.

    The outcomes are the vocabulary. For a cached teacher they are its T tokens and, at temperature 1, one outcome for
    all other tokens: the KL over them is a lower bound of the KL over the vocabulary, and the difference is the
    conditional KL within the other tokens. At other temperatures the mass of the other tokens is unknown, and both
    distributions are conditioned on the T tokens.

    Args:
        student: pass of the student.
        teacher: pass of the teacher over the same answer tokens.
        temperature: divides the logits of both.
        own: use the logits at the answer tokens themselves instead of those before them.

    Raises:
        ValueError: the requested logits are missing; a cache has none at the answer tokens.
    """
    if own:
        if student.own_AC is None or teacher.own_AC is None:
            raise ValueError("KL with shifted: false needs logits that a cached teacher does not store; use another.")
        return _log_softmax(student.own_AC, temperature), _log_softmax(teacher.own_AC, temperature)
    index_AT = teacher.top_indices_AT
    if index_AT is None:
        return _log_softmax(student.logits_AC, temperature), _log_softmax(teacher.logits_AC, temperature)
    if temperature != 1:
        student_AT = student.logits_AC.gather(1, index_AT)
        return _log_softmax(student_AT, temperature), _log_softmax(teacher.logits_AC, temperature)
    assert teacher.tail_A is not None
    log_q_AC = _log_softmax(student.logits_AC, 1.0)
    rest_A = log_q_AC.scatter(1, index_AT, -torch.inf).logsumexp(1)
    log_q_AK = torch.cat([log_q_AC.gather(1, index_AT), rest_A[:, None]], 1)
    return log_q_AK, torch.cat([teacher.logits_AC, teacher.tail_A[:, None]], 1).float()


class KL(Loss):
    """T^2 KL(teacher || student) on the answer tokens (arXiv 1503.02531, section 2).

    The pruned student has a shorter sequence than its teacher. Text is never dropped, so both have the same answer
    tokens in the same order.

    Args:
        temperature: softmax temperature of both distributions.
        shifted: compare the logits that predict each answer token. `false` compares the logits at the tokens
            themselves, as the code of EPIC does (arXiv 2510.00515): the first answer token is then not distilled, the
            token after the last one is, and logits are computed for the whole sequence.
        weight: of the term.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    name = "kl"
    test_arguments = ({"temperature": 2.0}, {"shifted": False})

    def __init__(self, temperature: float = 1.0, shifted: bool = True, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        self.temperature, self.shifted = checked_temperature(temperature, self.name), shifted

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher"} if self.shifted else {"teacher", "own"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        if teacher is None or not len(student.targets_A):
            return None
        log_q_AC, log_p_AC = aligned(student, teacher, self.temperature, own=not self.shifted)
        return student.answer_mean(kl_divergence(log_p_AC.detach(), log_q_AC)) * self.temperature**2


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
