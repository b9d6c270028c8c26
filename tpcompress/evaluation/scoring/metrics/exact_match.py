"""Exact match: the share of questions whose whole answer is right."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.evaluation.scoring.metrics.base import Answers, Metric, Reply


class ExactMatch(Metric):
    """1 if every token of the answer is right, or if a generated answer is a reference but for white space, else 0."""

    name = "exact_match"

    def __call__(self, answers: Answers) -> tuple[Tensor, ...]:
        return answers.right_Q, torch.ones_like(answers.tokens_Q)

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        return float(any(reply.text.split() == reference.split() for reference in reply.references)), 1.0
