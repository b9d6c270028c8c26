"""PyramidDrop: retain, stage by stage, what the layer ahead attends to most (arXiv 2410.17247, section 3).

B rows, V vision tokens, H attention heads.
"""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import head_mean, keep_topk


class PyramidDrop(Pruner):
    """score(v) = mean over heads of A[last prompt token, v] that the layer after the stage would pay.

    One such stage at each of several layers makes the pyramid (`pyramid_stages`).

    needs  attention_next (so `layer` >= 1).     gives  keep_BV, scores_BV.
    Paper: 4 equal parts of the language model, lambda = 0.5: of 32 layers, `layer` 8, 16 and 24 keep 50, 25 and
    12.5 % of the original count, renumbered (`positions: compact`). Cost: one row of attention; that layer's norm and
    projections run once more.
    Unlike the official code: grouped keys, left padding and several images work; projections are the family's own. In
    training, too, the query is the last prompt token, where the official code averages over every position before an
    answer. Ratios round, where the official int of 0.5, 0.25 and 0.125 of 576 is the same.
    """

    name = "pyramiddrop"
    paper = "2410.17247"
    group = "attention in the language model"
    paper_plan = """
    # PyramidDrop on 32 layers: 288, 144 and 72 of LLaVA-1.5's 576 tokens from layers 8, 16 and 24 on; renumbered.
    # Other depths: tpcompress.pruners.pyramiddrop.pyramid_stages.
    stages:
      - {pruner: pyramiddrop, layer: 8, keep_ratio: 0.5}  # lambda
      - {pruner: pyramiddrop, layer: 16, keep_ratio: 0.25}
      - {pruner: pyramiddrop, layer: 24, keep_ratio: 0.125}
    positions: compact
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention_next"})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.attention_next_BHV is not None
        scores_BV = head_mean(tokens.attention_next_BHV)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def pyramid_stages(num_layers: int, parts: int = 4, ratio: float = 0.5) -> list[tuple[int, float]]:
    """(`layer`, `keep_ratio`) of each stage: after part s of the language model, ratio^s of the original tokens stay.

    Args:
        num_layers: of the language model.
        parts: how many equal parts it is cut into; a stage stands between any two.
        ratio: the paper's lambda.

    Raises:
        ValueError: less than two parts or more than layers, or a ratio outside (0, 1].
    """
    if not 2 <= parts <= num_layers:
        raise ValueError(f"A pyramid over {num_layers} layers has 2 to {num_layers} parts, got {parts}.")
    if not 0 < ratio <= 1:
        raise ValueError(f"A pyramid's ratio must be in (0, 1], got {ratio!r}.")
    return [(num_layers * s // parts, ratio**s) for s in range(1, parts)]
