"""Relaxed accuracy (ChartQA, PlotQA): numbers may be 5 % off."""

from __future__ import annotations

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.text import as_number, collapsed

TOLERANCE = 0.05


class RelaxedAccuracy(Metric):
    """1 if the answer is within 5 % of a reference that is a number other than 0, or equals the reference as text.

    A percent sign divides by 100, on both sides. Years and small counts pass within 5 % too, as in the paper.
    """

    name = "relaxed_accuracy"
    title = "Relaxed accuracy"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        return float(any(_accepts(reply.text, reference) for reference in reply.references)), 1.0


def _accepts(answer: str, reference: str) -> bool:
    said, wanted = as_number(answer), as_number(reference)
    if said is not None and wanted:
        # Rounding must not decide at exactly 5 %: 105 for 100.
        return abs(said - wanted) <= TOLERANCE * abs(wanted) * (1 + 1e-9)
    return collapsed(answer).rstrip(".") == collapsed(reference).rstrip(".")
