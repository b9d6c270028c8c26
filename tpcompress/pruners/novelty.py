"""Novelty: retain the tokens least like any token before them (ours; what an untrained learned gate starts from)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, novelty


class Novelty(Pruner):
    """score(v) = 1 - max_{w < v} cos(x_v, x_w): of several equal tokens the first is new, the others are not.

    needs  nothing.     gives  keep_BV, scores_BV.
    Cost: one V x V Gram matrix and one sort of V; no greedy loop, so it is a cheaper variant of
    farthest-point selection. Every token is compared with all earlier ones, retained or not.
    """

    name = "novelty"
    group = "duplication and diversity"
    paper_plan = """
    # Novelty (ours): 64 of LLaVA-1.5's 576 tokens, those least like any token before them.
    stages:
      - {pruner: novelty, keep_tokens: 64}
    """

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        scores_BV = novelty(tokens.vision_BVD, tokens.valid_BV)[..., 0]
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)
