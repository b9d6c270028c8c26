"""DART: retain the vision tokens that duplicate a few pivots least (arXiv 2502.11494, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, on

PIVOTS = ("key_norm", "hidden_norm")


class DART(Pruner):
    """keep = vision pivots + from the rest, pivot by pivot, the tokens with the lowest cos(h_pivot, h_v).

    Pivots p are the tokens of largest norm: ||k||_1 of the keys of the layer before (`pivot: key_norm`, needs a
    stage at layer >= 1), or ||h||_2 of the hidden states (`pivot: hidden_norm`, any layer). Text pivots steer the
    choice and are not counted. Every pivot takes an equal share of what is left of the budget, the first ones one
    more where it does not divide.

    needs  keys with key_norm, text with text_pivots > 0.     gives  keep_BV, scores_BV = -max_p cos(h_p, h_v).
    Paper: 4 + 4 pivots, layer 2, key L1 norm. Unlike the official code: exact counts (there 4 + 8 * share), batched,
    pivots visited from the largest norm down, cosine of the raw hidden states (there after the final RMS norm),
    fewer text tokens than pivots allowed.
    """

    name = "dart"

    def __init__(self, vision_pivots: int = 4, text_pivots: int = 4, pivot: str = "key_norm") -> None:
        super().__init__()
        if vision_pivots < 0 or text_pivots < 0 or vision_pivots + text_pivots == 0:
            raise ValueError(f"dart needs at least one pivot, got vision {vision_pivots} and text {text_pivots}.")
        if pivot not in PIVOTS:
            raise ValueError(f"dart has no pivot criterion '{pivot}'; choose one of {', '.join(PIVOTS)}.")
        self.vision_pivots, self.text_pivots, self.pivot = vision_pivots, text_pivots, pivot

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys"} if self.pivot == "key_norm" else ()) | ({"text"} if self.text_pivots else set())

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        x_BVD, text_BSD = tokens.vision_BVD.float(), tokens.text_BSD
        keys = (tokens.keys_BVD, tokens.text_keys_BSD) if self.pivot == "key_norm" else (x_BVD, text_BSD)
        power = 1 if self.pivot == "key_norm" else 2
        assert keys[0] is not None
        count_B = on(num_keep_B, x_BVD)
        pivot_BP, taken_BV, chosen_BP = pick_pivots(
            keys[0].float().norm(power, -1), tokens.valid_BV, self.vision_pivots
        )
        chosen_BP &= torch.arange(chosen_BP.shape[1], device=x_BVD.device) < count_B[:, None]
        taken_BV = torch.zeros_like(taken_BV).scatter(1, pivot_BP, chosen_BP)
        feature_BPD = x_BVD.gather(1, pivot_BP[..., None].expand(-1, -1, x_BVD.shape[-1]))
        if self.text_pivots:
            assert text_BSD is not None and tokens.text_valid_BS is not None and keys[1] is not None
            norm_BS = keys[1].float().norm(power, -1)
            index_BP, _, found_BP = pick_pivots(norm_BS, tokens.text_valid_BS, self.text_pivots)
            text_BPD = text_BSD.float().gather(1, index_BP[..., None].expand(-1, -1, x_BVD.shape[-1]))
            feature_BPD, chosen_BP = torch.cat([feature_BPD, text_BPD], 1), torch.cat([chosen_BP, found_BP], 1)
        similar_BPV = F.normalize(feature_BPD, dim=-1) @ F.normalize(x_BVD, dim=-1).mT
        keep_BV = least_similar(similar_BPV, chosen_BP, taken_BV, tokens.valid_BV, count_B)
        scores_BV = -similar_BPV.masked_fill(~chosen_BP[..., None], -torch.inf).amax(1)
        return Selection(keep_BV, scores_BV.nan_to_num(neginf=-1.0, posinf=1.0))


def pick_pivots(norm_BV: Tensor, valid_BV: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` valid tokens of largest norm, from the largest down: (index (B, P), picked (B, V), exists (B, P))."""
    num = min(num, norm_BV.shape[1])
    masked_BV = norm_BV.masked_fill(~valid_BV, -torch.inf)
    index_BP = masked_BV.argsort(dim=1, descending=True, stable=True)[:, :num]
    exists_BP = valid_BV.gather(1, index_BP)
    return index_BP, torch.zeros_like(valid_BV).scatter(1, index_BP, exists_BP), exists_BP


def least_similar(similar_BPV: Tensor, pivot_BP: Tensor, taken_BV: Tensor, valid_BV: Tensor, count_B: Tensor) -> Tensor:
    """Fill the budget: each pivot in turn takes its share of the free tokens least similar to it.

    Args:
        similar_BPV: cosine of pivot p and vision token v (B, P, V).
        pivot_BP: False where the pivot does not exist (it gets no share).
        taken_BV: vision tokens kept already.
        valid_BV: bool (B, V).
        count_B: the exact budget, on the same device.

    Returns:
        bool (B, V) with `count` True per row.
    """
    left_B = count_B - taken_BV.sum(1)
    pivots_B = pivot_BP.sum(1).clamp(min=1)
    place_BP = pivot_BP.cumsum(1) - 1
    share_BP = (left_B // pivots_B)[:, None] + (place_BP < (left_B % pivots_B)[:, None])
    for p in range(similar_BPV.shape[1]):
        free_BV = valid_BV & ~taken_BV
        share_B = share_BP[:, p].masked_fill(~pivot_BP[:, p], 0)
        taken_BV = taken_BV | keep_topk(-similar_BPV[:, p], free_BV, share_B)
    # Without any pivot (no vision pivot asked for, no text) the first tokens fill the budget.
    return taken_BV | keep_topk(
        torch.zeros_like(valid_BV, dtype=torch.float), valid_BV & ~taken_BV, count_B - taken_BV.sum(1)
    )
