"""The interface of a metric: what it counts of the answer to one question, and the score of the summed counts.

A metric counts teacher-forced answers (`__call__`, from logits), generated answers (`of_reply`, from text), or both.

T answer tokens of a batch, Q its questions, C vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.evaluation.scoring.stats import ratio

UNKNOWN = "–"


@dataclass(frozen=True)
class Unit:
    """How values of a metric are written.

    Attributes:
        scale: factor between the stored and the written number.
        suffix: text after a number in a sentence.
        title: the unit in the title of a table.
        digits: decimals.
    """

    scale: float = 100.0
    suffix: str = " %"
    title: str = "percent"
    digits: int = 1

    def number(self, value: float | None) -> str:
        """A value without its unit: `83.1`."""
        return UNKNOWN if value is None else f"{self.scale * value:.{self.digits}f}"

    def text(self, value: float | None) -> str:
        """A value with its unit: `83.1 %`."""
        return self.number(value) + self.suffix

    def change(self, value: float) -> str:
        """A difference with its sign: `+3.1`."""
        return f"{self.scale * value:+.{self.digits}f}"


PERCENT = Unit()


@dataclass(frozen=True, eq=False)
class Answers:
    """The teacher-forced answers of a batch: each token is predicted from the reference tokens before it.

    Attributes:
        logits_TC: logits at the answer tokens, end tokens included.
        target_T: reference tokens.
        question_T: question of each token.
        families: family of each question.
    """

    logits_TC: Tensor
    target_T: Tensor
    question_T: Tensor
    families: list[str]

    @cached_property
    def predicted_T(self) -> Tensor:
        """The token with the largest logit."""
        return self.logits_TC.argmax(-1)

    @cached_property
    def right_T(self) -> Tensor:
        """True where the reference token has the largest logit."""
        return self.predicted_T == self.target_T

    @cached_property
    def loss_T(self) -> Tensor:
        """Cross entropy of each token in nats, in fp32."""
        return F.cross_entropy(self.logits_TC.float(), self.target_T, reduction="none")

    @cached_property
    def tokens_Q(self) -> Tensor:
        """Answer tokens of each question."""
        return self.total_Q(torch.ones_like(self.loss_T))

    @cached_property
    def right_Q(self) -> Tensor:
        """True where every token of the answer is right, which is when greedy decoding gives the reference answer."""
        return self.total_Q(self.right_T.float()) == self.tokens_Q

    def total_Q(self, value_T: Tensor) -> Tensor:
        """Sum over the tokens of each question."""
        return value_T.new_zeros(len(self.families)).index_add(0, self.question_T, value_T)


@dataclass(frozen=True)
class Reply:
    """A generated answer.

    Attributes:
        text: what the model answered, without special tokens.
        references: right answers, at least one.
        prompt: the question: the last turn before the answer.
        family: family of the question.
    """

    text: str
    references: tuple[str, ...]
    prompt: str = ""
    family: str = ""


class Metric:
    """Counts the answer to a question. Larger is better.

    A subclass implements `__call__`, `of_reply` or both. The counts of all questions of a family are summed, and
    `aggregate` makes the score of the sums: by default the first (values) over the second (weights). A question that a
    metric does not apply to has the weight 0.

    Attributes:
        name: word for it in files (`metric: exact_match`).
        title: heading of its numbers.
        unit: how its values are written.
        learnt_margin: how far the dense base must be above its blank baseline in a family for the family to count.
        beside: metrics of generated answers that are measured together with this one.
        applies_to: what a reference must be for the question to count (`a number`); empty if every question does.
    """

    name: ClassVar[str]
    title: ClassVar[str] = "Accuracy"
    unit: ClassVar[Unit] = PERCENT
    learnt_margin: ClassVar[float] = 0.1
    beside: ClassVar[tuple[str, ...]] = ()
    applies_to: ClassVar[str] = ""

    @property
    def reads_logits(self) -> bool:
        """It counts teacher-forced answers."""
        return type(self).__call__ is not Metric.__call__

    @property
    def reads_text(self) -> bool:
        """It counts generated answers."""
        return type(self).of_reply is not Metric.of_reply

    def __call__(self, answers: Answers) -> tuple[Tensor, ...]:
        """Counts (Q,) of each question, value and weight first."""
        raise NotImplementedError(f"{type(self).__name__} reads generated answers; score with `generate`.")

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        """Counts of one generated answer, value and weight first."""
        raise NotImplementedError(f"{type(self).__name__} reads logits; score without `generate`.")

    def is_right(self, reply: Reply) -> bool:
        """Whether the answer counts as right: at least half of its weight. For flips and calibration."""
        value, weight = self.of_reply(reply)[:2]
        return weight > 0 and value >= 0.5 * weight

    def aggregate(self, *sums: np.ndarray) -> np.ndarray:
        """The score of summed counts, elementwise; nan where there is nothing to count."""
        return ratio(sums[0], sums[1])
