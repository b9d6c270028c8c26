"""Exact match: the share of questions whose whole answer is right."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.evaluation.scoring.metrics.base import Answers, Metric


class ExactMatch(Metric):
    """1 if every token of the answer is right, else 0."""

    name = "exact_match"

    def __call__(self, answers: Answers) -> tuple[Tensor, Tensor]:
        return answers.right_Q, torch.ones_like(answers.tokens_Q)
