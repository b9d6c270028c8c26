"""FasterVLM: retain the patches that the class token attends to most (arXiv 2412.01818v1, section 4)."""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk
from tpcompress.pruners.tower_attention import SOURCES, check_source, saliency


class FasterVLM(Pruner):
    """score(v) = mean over heads of A[class token, v] in the last but one layer of the vision tower.

    `attention: received` takes the mean attention that v receives from all patches: for towers without a class token.

    needs  tower_cls, or tower_received.     gives  keep_BV, scores_BV.
    Paper: 29 to 144 of LLaVA-1.5's 576 tokens. Cost: one row of attention per head.
    Unlike the official code: that row is recomputed, so the tower stays on sdpa; the budget is one image's, of all its
    tiles together (there tile by tile).
    """

    name = "fastervlm"
    paper = "2412.01818"
    group = "attention in the vision tower"
    paper_plan = """
    # FasterVLM: 64 of LLaVA-1.5's 576 tokens by the class token's attention, in front of the language model;
    # renumbered.
    stages:
      - {pruner: fastervlm, keep_tokens: 64}
    positions: compact
    """
    test_arguments = ({"attention": "received"},)

    def __init__(self, attention: str = "class") -> None:
        super().__init__()
        check_source(self.name, attention)
        self.attention = attention

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SOURCES[self.attention]})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        scores_BV = saliency(tokens, self.attention)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)
