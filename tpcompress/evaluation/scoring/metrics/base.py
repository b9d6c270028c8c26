"""The interface of a metric: a value and a weight for each question, from the model's logits of the answer tokens.

T answer tokens of a batch, Q its questions, C vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

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
    def right_T(self) -> Tensor:
        """True where the reference token has the largest logit."""
        return self.logits_TC.argmax(-1) == self.target_T

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


class Metric:
    """Counts the answer to a question. Larger is better.

    The score of a family is the sum of the values of its questions over the sum of their weights.

    Attributes:
        name: word for it in files (`metric: exact_match`).
        title: heading of its numbers.
        unit: how its values are written.
        learnt_margin: how far the dense base must be above its blank baseline in a family for the family to count.
    """

    name: ClassVar[str]
    title: ClassVar[str] = "Accuracy"
    unit: ClassVar[Unit] = PERCENT
    learnt_margin: ClassVar[float] = 0.1

    def __call__(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Value and weight (Q,) of each question."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(answers) -> (value_Q, weight_Q).")
