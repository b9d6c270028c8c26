"""HiPrune: retain anchors of a middle layer with their neighbours, then the attended of a deep one (arXiv 2508.00553).

B rows, V tokens, A anchors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, slots
from tpcompress.pruners.tower_attention import check_share, in_tiers, saliency


class HiPrune(Pruner):
    """keep = anchors + their neighbours above, below, left and right + the top of g in the deep layer.

    g is the attention that a patch receives, mean over heads and queries. The anchors are the top round(alpha T / 5) of
    g in `object_layer`, the rest is filled by g in `deep_layer`. Both are indices of tower layers: 0 is the first, and
    negative ones count from the end. Neighbours are those of the same tile.

    needs  tower_received in layers (object_layer, deep_layer).
    gives  keep_BV, scores_BV = (anchor, neighbour or neither; g of the deep layer).
    Paper: alpha 0.1. Its layers count from 1: layer 9 of CLIP's 24 is index 8, and the last but one is index -2. For
    Qwen2.5-VL the official code reads layer 16 and the last one: `object_layer: 15, deep_layer: -1`, both of which
    attend to the whole image. A tower with too few layers is refused at `attach`.
    Cost: attention maps of two layers of the tower; A x V.
    Unlike the official code: neighbours end at the edge of the grid, also after an earlier stage; a batch of images of
    any shape. `compat` takes those at -1, +1 and one grid row before and after in the sequence, which continue in the
    next grid row at an edge, and the first and last token where there is none.
    """

    name = "hiprune"
    paper = "2508.00553"
    group = "attention in the vision tower"
    paper_plan = """
    # HiPrune: 64 of LLaVA-1.5's 576 tokens, 1 anchor of tower layer 9 with its 4 neighbours, 59 of layer -2;
    # renumbered.
    stages:
      - {pruner: hiprune, keep_tokens: 64}
    positions: compact
    """
    test_arguments = (
        {"alpha": 1.0},
        {"alpha": 0.7, "compat": True},
        {"object_layer": 0},
        {"object_layer": 1, "deep_layer": -1},
    )

    def __init__(self, alpha: float = 0.1, object_layer: int = 8, compat: bool = False, deep_layer: int = -2) -> None:
        super().__init__()
        check_share(self.name, "alpha", alpha)
        self.alpha, self.object_layer, self.compat, self.deep_layer = alpha, object_layer, compat, deep_layer

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_received"})

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (self.object_layer, self.deep_layer)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        middle_BV, deep_BV = (saliency(tokens, "received", layer) for layer in (0, 1))
        anchors_B = (num_keep_B.double() * self.alpha / 5).round().long()
        anchor_BV = keep_topk(middle_BV, tokens.valid_BV, anchors_B)
        index_BA, exists_BA = slots(anchor_BV, int(anchors_B.max()))
        near_BAV = sequence_neighbours(tokens, index_BA) if self.compat else grid_neighbours(tokens, index_BA)
        near_BV = (near_BAV & exists_BA[..., None]).any(1)
        # Anchors come before neighbours where the budget does not hold both.
        scores_BV = in_tiers(torch.where(anchor_BV, 2, near_BV.long()), deep_BV)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def grid_neighbours(tokens: TokenView, index_BA: Tensor) -> Tensor:
    """bool (B, A, V): the tokens one row or one column from each of some tokens in the same tile."""
    token = {name: getattr(tokens, name) for name in ("row_BV", "col_BV", "tile_BV", "image_BV")}
    gap = {name: (x_BV.gather(1, index_BA)[..., None] - x_BV[:, None]).abs() for name, x_BV in token.items()}
    same_BAV = (gap["tile_BV"] == 0) & (gap["image_BV"] == 0) & tokens.valid_BV[:, None]
    return same_BAV & (gap["row_BV"] + gap["col_BV"] == 1)


def sequence_neighbours(tokens: TokenView, index_BA: Tensor) -> Tensor:
    """bool (B, A, V): the tokens 1 and one grid row from each of some tokens in the sequence, clamped to its ends."""
    place_BV, last_B11 = tokens.valid_BV.cumsum(1) - 1, tokens.valid_BV.sum(1)[:, None, None] - 1
    width_B1 = tokens.col_BV.masked_fill(~tokens.valid_BV, 0).amax(1, keepdim=True) + 1
    step_B14 = torch.cat([-torch.ones_like(width_B1), torch.ones_like(width_B1), -width_B1, width_B1], 1)[:, None]
    at_BA4 = (place_BV.gather(1, index_BA)[..., None] + step_B14).clamp(min=0).minimum(last_B11)
    return (at_BA4[..., None] == place_BV[:, None, None]).any(2) & tokens.valid_BV[:, None]
