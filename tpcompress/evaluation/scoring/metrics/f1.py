"""F1 of the words of an answer, as in SQuAD."""

from __future__ import annotations

from typing import Any

from torchmetrics.functional.text import squad

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply


class F1(Metric):
    """Harmonic mean of precision and recall of the words, with the best reference, as SQuAD normalizes them."""

    name = "f1"
    title = "F1 of the words"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        answers = {"text": list(reply.references), "answer_start": [0] * len(reply.references)}
        target: dict[str, Any] = {"answers": answers, "id": "0"}
        scored = squad([{"prediction_text": reply.text, "id": "0"}], [target])
        return float(scored["f1"]) / 100, 1.0
