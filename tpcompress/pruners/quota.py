"""Quota: any rule with a share of the budget for each tile, image or frame of its row (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import SHARES, Composed, quotas
from tpcompress.pruners.topk import rank

GROUPS = ("tile", "frame", "image")


class Quota(Composed):
    """keep = the best tokens of each group by the inner rule, in equal shares or in proportion to its tokens.

    `per: tile` and `per: frame` are synonyms: the rectangles of a row are the tiles of an image or
    the frames of a video. `per: image` matters under the plan's `scope: prompt`, where one row holds several images.
    `share: equal` differs by at most one token between groups that have enough; `share: proportional` follows the
    number of tokens to within one (see `quotas`). Unlike a budget per image, the total stays the row's own.

    needs  what the inner rule needs.     gives  keep_BV, scores_BV = - place in the order of the quotas.
    An inner rule that learns trains through its own gates, on its scores in the order of the quotas.
    Cost: two runs of the inner rule, one of them at full budget (a greedy rule then makes V picks), and sorts of V.
    The inner rule ranks all tokens of the row together: `divprune` still looks at other tiles.
    """

    name = "quota"
    only_rank = True
    group = "combination of pruners"
    paper_plan = """
    # Equal shares for the images of a prompt: 64 tokens in all from layer 2 on, of each image the best by attention.
    stages:
      - pruner: {type: quota, per: image}
        layer: 2
        keep_tokens: 64
    scope: prompt  # one budget for all images
    """
    test_arguments = (
        {"share": "proportional"},
        {"per": "image"},
        {"per": "frame", "pruner": {"type": "novelty"}},
        {"pruner": {"type": "learned_gate", "selector": "straight_through", "applier": "value"}},
    )

    def __init__(
        self, pruner: Pruner | str | dict[str, Any] = "fastv", per: str = "tile", share: str = "equal"
    ) -> None:
        super().__init__(pruner=pruner)
        if per not in GROUPS:
            raise ValueError(f"quota has no group '{per}'; choose one of {', '.join(GROUPS)}.")
        if share not in SHARES:
            raise ValueError(f"quota has no share '{share}'; choose one of {', '.join(SHARES)}.")
        self.per, self.share = per, share
        self.adopt()

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        if self.learned:
            return super().forward(tokens, num_keep_B)
        with torch.no_grad():
            return self._quotas(self.ranking(self.parts[0], tokens, num_keep_B), tokens, num_keep_B)

    def order(self, tokens: TokenView, scores_BV: Tensor, num_keep_B: Tensor) -> Tensor:
        return -self._quotas(rank(scores_BV, tokens.valid_BV), tokens, num_keep_B).scores_BV.long()

    def _quotas(self, place_BV: Tensor, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        group_BV = tokens.image_BV if self.per == "image" else tokens.tile_BV
        return quotas(place_BV, group_BV, tokens.valid_BV, num_keep_B, self.share)
