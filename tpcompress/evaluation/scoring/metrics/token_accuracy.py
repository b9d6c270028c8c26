"""Token accuracy: the share of answer tokens that are right, given the reference tokens before them."""

from __future__ import annotations

from torch import Tensor

from tpcompress.evaluation.scoring.metrics.base import Answers, Metric


class TokenAccuracy(Metric):
    """Right tokens of the answer, weighted by its length. For open answers, where exact match is zero."""

    name = "token_accuracy"
    title = "Token accuracy"

    def __call__(self, answers: Answers) -> tuple[Tensor, ...]:
        return answers.total_Q(answers.right_T.float()), answers.tokens_Q
