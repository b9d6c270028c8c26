"""Numbers: equality and absolute error of counts and measurements."""

from __future__ import annotations

import math

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply, Unit
from tpcompress.evaluation.scoring.text import first_number


def _numbers(reply: Reply) -> tuple[float | None, list[float]]:
    """The number of the answer, and those of the references."""
    wanted = [number for text in reply.references if (number := first_number(text)) is not None]
    return first_number(reply.text), wanted


class Number(Metric):
    """1 if the first number of the answer equals that of a reference; `three` is 3.

    A question whose references have no number does not count.
    """

    name = "number"
    title = "Right numbers"
    applies_to = "a number"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        said, wanted = _numbers(reply)
        return float(said is not None and any(math.isclose(said, w, rel_tol=1e-6) for w in wanted)), float(bool(wanted))


class NumberError(Metric):
    """Minus the mean absolute error to the nearest reference; an answer without a number counts as 0."""

    name = "number_error"
    title = "Minus the mean absolute error"
    unit = Unit(scale=1.0, suffix="", title="the unit of the numbers", digits=3)
    beside = ("number",)
    applies_to = "a number"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        said, wanted = _numbers(reply)
        return (-min(abs((said or 0.0) - number) for number in wanted), 1.0) if wanted else (0.0, 0.0)

    def is_right(self, reply: Reply) -> bool:
        return Number().is_right(reply)
