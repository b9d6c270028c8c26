"""Distillation of the hidden states that the output head reads at answer tokens.

A answer tokens, D hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp
from tpcompress.training.passes import Pass

METRICS = ("cosine", "mse")


def cosine_gap(student_AD: Tensor, teacher_AD: Tensor) -> Tensor:
    """1 - cos(student, teacher) of each answer token (A,), fp32."""
    return 1 - F.cosine_similarity(student_AD.float(), teacher_AD.float(), dim=-1)


def relative_error(student_AD: Tensor, teacher_AD: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 of each answer token (A,), fp32; 1 for a student of zeros."""
    teacher_AD = teacher_AD.float()
    gap_A = (student_AD.float() - teacher_AD).square().sum(-1)
    return gap_A / teacher_AD.square().sum(-1).clamp(min=1e-12)


class Hidden(Loss):
    """Distance of the output head's input from the teacher's, at the positions that predict answer tokens.

    Args:
        metric: `cosine` compares directions; `mse` compares vectors, relative to the teacher's norm.
        weight: factor on the term.

    Raises:
        ValueError: unknown metric; at a call, a cached teacher, which stores no hidden states.
    """

    name = "hidden"
    test_arguments = ({}, {"metric": "mse"})

    def __init__(self, metric: str = "cosine", weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if metric not in METRICS:
            raise ValueError(f"Loss 'hidden' has no metric '{metric}'; choose one of {', '.join(METRICS)}.")
        self.metric = metric

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        if teacher is None or not len(student.targets_A):
            return None
        if teacher.hidden_AD is None or student.hidden_AD is None:
            raise ValueError(
                "Loss 'hidden' compares hidden states, which a cached teacher does not store; use another."
            )
        compare = cosine_gap if self.metric == "cosine" else relative_error
        return student.answer_mean(compare(student.hidden_AD, teacher.hidden_AD.detach()))
