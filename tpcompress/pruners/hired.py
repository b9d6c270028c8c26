"""HiRED: an early tower layer shares the budget out over crops, a late one chooses (arXiv 2408.10945)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import place_inside, places
from tpcompress.pruners.tiles import mosaic, sum_of_parts
from tpcompress.pruners.topk import keep_topk, on, rank
from tpcompress.pruners.tower_attention import SOURCES, check_share, check_source, saliency


class HiRED(Pruner):
    """Of a budget k, floor(alpha k) tokens are the overview's, the rest the crops', shared out in proportion to

    c_j = how many of the overview's floor(n (1 - alpha)) tokens of largest attention in `early_layer` lie in crop j.

    keep = in each part the tokens of largest attention in `late_layer`. Shares of crops are Webster's (keys (i + 1/2) /
    c_j), a crop without content comes last, and what a part cannot use goes to the others, so the budget is exact.

    Crops are those of a row of two rectangles, an overview and a mosaic (LLaVA-NeXT, LLaVA-OneVision). An image of one
    rectangle is the paper's single partition: top-k by attention in the late layer. Where tiles are rectangles of their
    own (InternVL, Idefics 3, SmolVLM), or frames, their places in the overview are not to be seen: each has an equal
    share, also the overview.

    needs  tower_cls in layers (early_layer, late_layer); tower_received with attention received.
    gives  keep_BV, scores_BV = - place in this order.
    Paper: alpha 0.5, layers 0 and 22 of CLIP's 24 (index -2), 20 % of LLaVA-NeXT's tokens.
    Cost: attention rows of two layers of the tower, a few sorts of V.
    Unlike the official code: an exact budget of the tokens without padding (there rounded down, and counted with
    padded tiles, whose tokens and newlines come and go afterwards); c_j counts the tokens that lie over crop j (there
    runs of the flattened overview). All parts of the method are here.
    """

    name = "hired"
    paper = "2408.10945"
    group = "attention in the vision tower"
    paper_plan = """
    # HiRED: 20 % of LLaVA-NeXT's tokens before the language model, half of them of the overview; renumbered.
    stages:
      - {pruner: hired, layer: 0, keep_ratio: 0.2}
    positions: compact
    """
    test_arguments = (
        {"alpha": 0.0},
        {"alpha": 1.0, "attention": "received", "early_layer": 1, "late_layer": -1},
    )

    def __init__(
        self, alpha: float = 0.5, early_layer: int = 0, late_layer: int = -2, attention: str = "class"
    ) -> None:
        super().__init__()
        check_share(self.name, "alpha", alpha)
        check_source(self.name, attention)
        self.alpha, self.early_layer, self.late_layer, self.attention = alpha, early_layer, late_layer, attention

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SOURCES[self.attention]})

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (self.early_layer, self.late_layer)

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        early_BV, late_BV = (saliency(tokens, self.attention, layer) for layer in (0, 1))
        valid_BV, parts = tokens.valid_BV, mosaic(tokens)
        count_B1 = on(num_keep_B, late_BV)[:, None]
        best_BV = rank(late_BV, valid_BV)
        inside_BV = place_inside(best_BV, parts.part_BV, valid_BV)[0]
        size_B1 = parts.overview_BV.sum(1, keepdim=True)
        # A little more than the product, whose rounding must not take a token from it.
        rich_BV = keep_topk(early_BV, parts.overview_BV, (size_B1[:, 0] * (1 - self.alpha) + 1e-4).long())
        content_BV = torch.where(parts.tiled_B1, sum_of_parts(rich_BV.float(), parts.crop_BV), 1.0)
        key_BV = (inside_BV + 0.5) / content_BV  # by 0: infinite, so last
        own_B1 = (count_B1 * self.alpha + 1e-4).long()
        tier_BV = torch.where(parts.overview_BV, 2 - 2 * (inside_BV < own_B1).long(), 1).masked_fill(~valid_BV, 3)
        place_BV = places(tier_BV, places(key_BV.masked_fill(parts.overview_BV, 0.0), best_BV))
        return Selection((place_BV < count_B1) & valid_BV, -place_BV.float())
