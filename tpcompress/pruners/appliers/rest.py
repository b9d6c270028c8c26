"""Rest token: one of the retained tokens stands for all that were dropped.

B rows, V tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.appliers.gather import cut
from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice
from tpcompress.pruners.topk import rank


class Rest(Applier):
    """Of k retained tokens the one of the lowest score, r, becomes the rest token:

    x'_r = sum of softmax(s)_j x_j over r and all dropped tokens j.
    So k - 1 tokens stay as they are, and the budget holds. Acts in inference too. Needs no full length; the softmax
    carries a gradient to the scores of all dropped tokens, whether the selector has gates or not. In mode `drop` gates
    also go along for losses on gates. Where nothing was dropped, r is itself, bit for bit.
    Source: EViT (2202.07800), section 3.2: weights there are the class token's attention, and the rest token is one
    more than the budget, at the end of the sequence; here it has the place of its best token.
    Cost: one sort of V, one pass over the tokens.
    """

    name = "rest"
    merges = True

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        vision_BVD = fuse_rest(tokens.vision_BVD, choice.scores_BV, choice.keep_BV, tokens.valid_BV)
        return cut(tokens, choice, vision_BVD=vision_BVD)


def fuse_rest(x_BVD: Tensor, scores_BV: Tensor, keep_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """New values (B, V, D): the last retained token of each row is the mean of what was dropped and itself.

    Args:
        x_BVD: values; the gradient reaches all that are averaged.
        scores_BV: what the softmax is of; the gradient reaches them.
        keep_BV: the retained tokens.
        valid_BV: bool (B, V).

    Returns:
        In the dtype of `x_BVD`; sums are in fp32. All other tokens are as they were, bit for bit.
    """
    place_BV = rank(scores_BV.detach(), keep_BV)
    seat_BV = keep_BV & (place_BV == keep_BV.sum(1, keepdim=True) - 1)
    fused_BV = (valid_BV & ~keep_BV) | seat_BV
    share_BV = scores_BV.float().masked_fill(~fused_BV, torch.finfo(torch.float32).min).softmax(1)
    share_BV = share_BV.masked_fill(~fused_BV, 0.0)
    rest_BD = torch.einsum("bv,bvd->bd", share_BV, x_BVD.float())
    return torch.where(seat_BV[..., None], rest_BD[:, None].to(x_BVD.dtype), x_BVD)
