"""FastV: retain the vision tokens that the last prompt token attends to most (arXiv 2403.06764, section 4)."""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk


class FastV(Pruner):
    """score(v) = mean over heads of A[last prompt token, v] in the layer before the stage.

    needs  attention (so `layer` >= 1; paper: K = 2 and half of the tokens).     gives  keep_BV, scores_BV.
    Unlike the official code: only the one query row is recomputed from the layer's own projections, so the model
    stays on sdpa or flash attention; batched; the query is the last *prompt* token, in training, too, where the
    official last token would be part of the answer.
    """

    name = "fastv"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.attention_BHV is not None
        scores_BV = tokens.attention_BHV.float().mean(1)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)
