"""Merge: the sequence is cut, and dropped tokens join the retained one that is most like them."""

from __future__ import annotations

import torch

from tpcompress.pruners.appliers.gather import cut
from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice
from tpcompress.pruners.merging import merge_groups, nearest_kept


class Merge(Applier):
    """x'_s = sum_j w_j x_j / sum_j w_j over s and the dropped tokens nearest to it (cosine);     w = 1 + m - sg(m).

    Acts in inference too, where w = 1: forward both are the same mean. Needs no full length, and every token has a
    gradient, dropped ones through the mean that they joined: dL/dm_j = <g_s, x_j - x'_s> / size.
    In mode `drop` gates also go along for losses on gates. The stage's input alone is edited.
    Cost: two products of V x V with the tokens.
    """

    name = "merge"
    merges = True

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        x_BVD, V, gate_BV = tokens.vision_BVD, tokens.vision_BVD.shape[1], choice.gate_BV
        weight_BV = None if gate_BV is None else torch.ones_like(gate_BV) + (gate_BV - gate_BV.detach())
        # How many a row retains at most is not known here; V is as right, and slower.
        group_BV, _ = nearest_kept(x_BVD.detach(), choice.keep_BV, tokens.valid_BV, V)
        vision_BVD = merge_groups(x_BVD, group_BV, choice.keep_BV, V, weight_BV)
        return cut(tokens, choice, vision_BVD=vision_BVD)
