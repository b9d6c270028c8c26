"""ANLS (DocVQA, InfographicVQA): similarity by edit distance, which forgives slips of reading."""

from __future__ import annotations

from torchmetrics.functional.text import edit_distance

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.text import collapsed

THRESHOLD = 0.5


class ANLS(Metric):
    """Average normalized Levenshtein similarity (Biten et al., 2019).

    With NL the edit distance over the longer length, of lower-cased texts with single blanks: the best 1 - NL of the
    references, and 0 where NL is not below 0.5.
    """

    name = "anls"
    title = "ANLS"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        return max(_similarity(collapsed(reply.text), collapsed(reference)) for reference in reply.references), 1.0


def _similarity(answer: str, reference: str) -> float:
    if answer == reference:
        return 1.0
    longest = max(len(answer), len(reference))
    if abs(len(answer) - len(reference)) >= THRESHOLD * longest:  # the distance is at least the difference of lengths
        return 0.0
    far = float(edit_distance(answer, reference, reduction="sum")) / longest
    return 1.0 - far if far < THRESHOLD else 0.0
