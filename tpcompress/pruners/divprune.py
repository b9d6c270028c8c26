"""DivPrune: retain the subset whose closest pair is farthest apart, greedily (arXiv 2503.02175, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import on


class DivPrune(Pruner):
    """d(i, j) = 1 - cos(x_i, x_j); first pick argmax_i min_{j != i} d(i, j), then argmax_i min_{j in S} d(i, j).

    needs  nothing.     gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last).
    Cost: one V x V Gram matrix, then V work per pick. Paper's default ratio: 0.098.
    Unlike the official code: batched, padding-safe, a picked token is never picked again (duplicates there shrink the
    set), ascending order, fp32.
    """

    name = "divprune"

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        with torch.no_grad():
            order_BV = farthest_points(tokens.vision_BVD, tokens.valid_BV, int(num_keep_B.max()))
        keep_BV = (order_BV < on(num_keep_B, order_BV)[:, None]) & tokens.valid_BV
        return Selection(keep_BV, -order_BV.float())


def farthest_points(vision_BVD: Tensor, valid_BV: Tensor, num_picks: int) -> Tensor:
    """Order of the greedy max-min picks.

    Args:
        vision_BVD: features (B, V, D).
        valid_BV: bool (B, V).
        num_picks: how many picks to make; rows with fewer valid tokens end with padding.

    Returns:
        int64 (B, V): 0 for the first pick, 1 for the next, ...; V for tokens never picked. Ties: the earlier token.
    """
    B, V, _ = vision_BVD.shape
    unit_BVD = F.normalize(vision_BVD.float(), dim=-1)
    distance_BVV = 1 - unit_BVD @ unit_BVD.mT
    diagonal_VV = torch.eye(V, dtype=torch.bool, device=valid_BV.device)
    nearest_BV = distance_BVV.masked_fill(diagonal_VV | ~valid_BV[:, None], torch.inf).amin(-1)
    order_BV = torch.full((B, V), V, device=valid_BV.device)
    open_BV = valid_BV.clone()
    for step in range(min(num_picks, V)):
        pick_B1 = nearest_BV.masked_fill(~open_BV, -torch.inf).argmax(1, keepdim=True)
        still_B1 = open_BV.gather(1, pick_B1)  # False once a row has run out of tokens
        order_BV.scatter_(1, pick_B1, torch.where(still_B1, step, order_BV.gather(1, pick_B1)))
        open_BV.scatter_(1, pick_B1, False)
        row_BV = distance_BVV.gather(1, pick_B1[..., None].expand(B, 1, V))[:, 0]
        nearest_BV = row_BV if step == 0 else nearest_BV.minimum(row_BV)
    return order_BV
