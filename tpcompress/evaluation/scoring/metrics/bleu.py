"""BLEU-4 of a corpus, with the counts of torchmetrics."""

from __future__ import annotations

import numpy as np
from torchmetrics.text import BLEUScore

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.stats import ratio
from tpcompress.evaluation.scoring.text import collapsed

ORDER = 4


class BLEU(Metric):
    """BLEU of a family: geometric mean of the precisions of 1- to 4-grams over all answers, times the brevity penalty.

    Counts of each answer are summed before the score is made, in every draw of the interval, too. Texts are lower-cased
    and split at blanks.
    """

    name = "bleu"
    title = "BLEU-4"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        counted = BLEUScore(n_gram=ORDER)
        counted.update([collapsed(reply.text)], [[collapsed(reference) for reference in reply.references]])
        lengths = (float(counted.preds_len), float(counted.target_len))
        return (*counted.numerator.tolist(), *counted.denominator.tolist(), *lengths)

    def is_right(self, reply: Reply) -> bool:
        return collapsed(reply.text) in map(collapsed, reply.references)

    def aggregate(self, *sums: np.ndarray) -> np.ndarray:
        matched, possible, (said, wanted) = np.stack(sums[:ORDER]), np.stack(sums[ORDER : 2 * ORDER]), sums[2 * ORDER :]
        precision = np.nan_to_num(ratio(matched, possible))
        with np.errstate(divide="ignore"):
            mean = np.exp(np.log(precision).mean(0))
        brevity = np.exp(np.minimum(0.0, 1.0 - np.nan_to_num(ratio(wanted, said), nan=np.inf)))
        return np.where(wanted > 0, mean * np.where(said > 0, brevity, 0.0), np.nan)
