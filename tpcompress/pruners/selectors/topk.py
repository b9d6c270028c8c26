"""Top-k: the best tokens, and no gradient."""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.gate_components import Choice, Scores, Selector
from tpcompress.pruners.topk import keep_topk


class TopK(Selector):
    """keep = the k tokens of the highest score; ties go to the earlier one.

    gives  keep_BV alone: a scorer after it learns only from a loss on its scores, or from an applier that weighs
    tokens by their scores.
    Cost: one sort of V.
    """

    name = "topk"

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        return Choice(keep_topk(scores.scores_BV, valid_BV, num_keep_B), scores.scores_BV)
