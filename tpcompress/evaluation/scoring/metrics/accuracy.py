"""Accuracy of mixed data: exact match of closed answers, token accuracy of open ones (family `chat`)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.evaluation.scoring.metrics.base import Answers, Metric

OPEN_FAMILY = "chat"
"""Family of open answers."""


class Accuracy(Metric):
    """Exact match; in family `chat`, token accuracy."""

    name = "accuracy"

    def __call__(self, answers: Answers) -> tuple[Tensor, ...]:
        tokens_Q = answers.tokens_Q
        open_Q = torch.tensor([name == OPEN_FAMILY for name in answers.families]).to(tokens_Q.device, non_blocking=True)
        value_Q = torch.where(open_Q, answers.total_Q(answers.right_T.float()), answers.right_Q.float())
        return value_Q, torch.where(open_Q, tokens_Q, 1.0)
