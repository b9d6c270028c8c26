"""Log-likelihood of the reference answer, per token: a smooth metric that also moves where no answer flips."""

from __future__ import annotations

from torch import Tensor

from tpcompress.evaluation.scoring.metrics.base import Answers, Metric, Unit


class LogLikelihood(Metric):
    """Mean log-probability of an answer token, in nats; 0 is certainty of every reference token."""

    name = "log_likelihood"
    title = "Log-likelihood of an answer token"
    unit = Unit(scale=1.0, suffix=" nats", title="nats", digits=3)

    def __call__(self, answers: Answers) -> tuple[Tensor, ...]:
        return -answers.total_Q(answers.loss_T), answers.tokens_Q
