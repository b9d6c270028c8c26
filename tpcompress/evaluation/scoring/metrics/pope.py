"""POPE's set: yes-no questions about objects, where a drift towards yes is what pruning may cause.

Each is a ratio of sums over the questions of a family, so its interval is that of a ratio, not of a mean of ratios.
"""

from __future__ import annotations

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.text import yes_or_no

SET = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1", "pope_yes_rate")


class _YesNo(Metric):
    """Reads answer and first reference as yes or no; a question without such a reference does not count."""

    beside = SET
    applies_to = "yes or no"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        wanted, said = _stated(reply), yes_or_no(reply.text)
        if wanted is None:
            return 0.0, 0.0
        value, weight = self.count(said, wanted)
        return float(value), float(weight)

    def is_right(self, reply: Reply) -> bool:
        return _stated(reply) is not None and yes_or_no(reply.text) == _stated(reply)

    def count(self, said: bool | None, wanted: bool) -> tuple[float, float]:
        """Value and weight of a question; `said` is None for an empty answer, which is wrong."""
        raise NotImplementedError(f"{type(self).__name__} must implement count(said, wanted).")


class PopeAccuracy(_YesNo):
    """Right answers over questions."""

    name = "pope_accuracy"
    title = "Accuracy of yes and no"

    def count(self, said: bool | None, wanted: bool) -> tuple[float, float]:
        return said == wanted, 1


class PopePrecision(_YesNo):
    """Right yes over answered yes."""

    name = "pope_precision"
    title = "Precision of yes"
    applies_to = "yes"

    def count(self, said: bool | None, wanted: bool) -> tuple[float, float]:
        return bool(said) and wanted, bool(said)


class PopeRecall(_YesNo):
    """Right yes over questions whose answer is yes."""

    name = "pope_recall"
    title = "Recall of yes"
    applies_to = "yes"

    def count(self, said: bool | None, wanted: bool) -> tuple[float, float]:
        return bool(said) and wanted, wanted


class PopeF1(_YesNo):
    """Harmonic mean of precision and recall of yes: 2 TP / (2 TP + FP + FN)."""

    name = "pope_f1"
    title = "F1 of yes"
    applies_to = "yes"

    def count(self, said: bool | None, wanted: bool) -> tuple[float, float]:
        return 2 * (bool(said) and wanted), int(bool(said)) + int(wanted)


class PopeYesRate(_YesNo):
    """Answered yes over questions: a description of the answers, of which more is not better."""

    name = "pope_yes_rate"
    title = "Rate of yes"

    def count(self, said: bool | None, wanted: bool) -> tuple[float, float]:
        return bool(said), 1


def _stated(reply: Reply) -> bool | None:
    """Whether the reference is yes; None if its first word is neither yes nor no."""
    first = reply.references[0].lower().strip().rstrip(".,!").partition(" ")[0].rstrip(".,!")
    return {"yes": True, "no": False}.get(first)
