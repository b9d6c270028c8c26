"""Contains: the share of answers in which a reference occurs, as in OCRBench."""

from __future__ import annotations

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.text import collapsed


class Contains(Metric):
    """1 if a reference is part of the answer, without regard to case and line breaks."""

    name = "contains"
    title = "Answers that contain a reference"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        text = collapsed(reply.text)
        return float(any(collapsed(reference) in text for reference in reply.references)), 1.0
