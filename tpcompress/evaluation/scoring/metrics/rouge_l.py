"""ROUGE-L, computed by torchmetrics."""

from __future__ import annotations

from torchmetrics.functional.text import rouge_score

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply


class RougeL(Metric):
    """Mean F-measure of the longest common subsequence of words with the best reference, without stemming."""

    name = "rouge_l"
    title = "ROUGE-L"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        scored = rouge_score(reply.text, [list(reply.references)], accumulate="best", rouge_keys="rougeL")
        return float(scored["rougeL_fmeasure"]), 1.0

    def is_right(self, reply: Reply) -> bool:
        return any(reply.text.lower().split() == reference.lower().split() for reference in reply.references)
