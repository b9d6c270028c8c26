"""VQA's soft accuracy (VQAv2, TextVQA): an answer counts by the number of annotators who gave it."""

from __future__ import annotations

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.text import vqa_normalized

LEAST = 4
"""References from which on leaving one out makes sense."""


class VQAAccuracy(Metric):
    """Mean over the references i of min(1, references other than i that equal the answer / 3).

    With ten references and m matches this is 0, 0.3, 0.6, 0.9 and, from m = 4 on, 1. With fewer than four references
    an answer that equals one of them counts 1. Answers are compared without articles, punctuation and case.
    """

    name = "vqa_accuracy"
    title = "VQA accuracy"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        answer, number = vqa_normalized(reply.text), len(reply.references)
        same = [vqa_normalized(reference) == answer for reference in reply.references]
        if number < LEAST:
            return float(any(same)), 1.0
        return sum(min(1.0, (sum(same) - own) / 3) for own in same) / number, 1.0
