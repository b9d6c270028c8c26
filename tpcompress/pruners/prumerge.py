"""PruMerge and PruMerge+: retain attended patches, each enriched by its nearest ones (arXiv 2403.15388, section 3).

B rows, V tokens, K slots of retained tokens, C width of what is merged, H heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, on, slots, take
from tpcompress.pruners.tower_attention import (
    check_merge_at,
    check_share,
    check_source,
    in_tiers,
    put,
    saliency,
    to_merge,
)

UNIFORM = 0.75
"""Share of the budget of PruMerge+ at even distances: 3 tokens for each one by attention."""


class PruMerge(Pruner):
    """a = softmax(q_class K^T / sqrt(Hd)), one head over all channels, in the tower's last layer; keep the top of a.

    A kept token becomes h_v + sum of a_n h_n over the `neighbours` other tokens n of nearest key (cosine), kept ones
    among them, and one token more becomes sum of a_n h_n over all that were not kept. It takes the slot of the best of
    these, so T - 1 tokens are kept as themselves; with `plus`, floor((T - 1) `uniform`) of them stand at even distances
    over what attention left. Where the budget holds all tokens none changes.

    `adaptive`: the tokens above Q3 + 1.5 (Q3 - Q1) of a in their row are kept, and with `plus` every s-th token before
    the last one, s = floor(floor(V / outliers) / 3) but at least 1; their number is not the budget's.

    needs  tower_keys, tower_cls_query or tower_received (`attention`), projector with `merge_at: features`.
    gives  keep_BV, scores_BV = (kept, slot of the rest or dropped; attention), vision_BVD.
    Paper: adaptive, 32 tokens of 576 on average, 144 with `plus` (1 by attention to 3 uniform ones), 32 neighbours,
    merging what the projector is given; new values are projector(merged). Its listing has the sum alone and the product
    of keys; h_v + sum and the cosine are the official code's. `merge_at: tokens` merges after the projector (see
    VisionZip); `attention: received` is for towers without a class token.
    Cost: V cosines per kept token. Unlike the official code: exact counts unless `adaptive`, quartiles of one row
    (there of the whole batch), batched, uniform tokens that are never among those of attention, ascending order (there
    by attention), the softmax over the row's patches (there with the class token's own key, which scales all a alike,
    and tile by tile). A stride below 1 or a row without outliers is an error there.
    `compat` retains the tokens of the official code at a fixed ratio: the T of highest attention and the token of the
    rest, T + 1 in all; with `plus`, floor(T / 2) by attention and the places s // 2, s // 2 + s, ... below V - 1 with
    s = floor(V / floor(T / 2)). A token in both of these lists stands twice in the official sequence and is its own
    neighbour there; here it stands once. With `adaptive`, `compat` changes nothing.
    """

    name = "prumerge"
    paper = "2403.15388"
    merges = True
    group = "attention in the vision tower"
    paper_plan = """
    # PruMerge: 32 of LLaVA-1.5's 576 tokens, what its adaptive count is on average (for that count itself: adaptive:
    # true). The last of the 32 is the sum of all that the others leave; renumbered.
    stages:
      - {pruner: prumerge, keep_tokens: 32}
    positions: compact
    """
    more_plans = {
        "prumerge_plus": """
        # PruMerge+: 144 of LLaVA-1.5's 576 tokens, what its adaptive count is on average (for that count itself:
        # adaptive: true). By attention 36, uniform over the others 107, and the sum of all that these leave;
        # renumbered.
        stages:
          - {pruner: {type: prumerge, plus: true}, keep_tokens: 144}
        positions: compact
        """,
    }
    test_arguments = (
        {"plus": True, "neighbours": 3},
        {"attention": "received", "merge_at": "tokens", "plus": True, "uniform": 1.0},
    )
    inexact_arguments = (
        {"adaptive": True},
        {"adaptive": True, "plus": True},
        {"plus": True, "compat": True},
    )

    def __init__(
        self,
        plus: bool = False,
        adaptive: bool = False,
        uniform: float = UNIFORM,
        neighbours: int = 32,
        attention: str = "class",
        merge_at: str = "features",
        compat: bool = False,
    ) -> None:
        super().__init__()
        check_source(self.name, attention)
        check_merge_at(self.name, merge_at)
        check_share(self.name, "uniform", uniform)
        if neighbours < 0:
            raise ValueError(f"prumerge merges 0 or more neighbours, got {neighbours}; 32 is the paper's.")
        if compat and plus and not adaptive and uniform != UNIFORM:
            raise ValueError(
                f"prumerge with compat and plus takes half of the budget at even distances, got uniform {uniform}; "
                f"leave uniform out or set compat to false."
            )
        self.plus, self.adaptive, self.uniform, self.neighbours = plus, adaptive, uniform, neighbours
        self.attention, self.merge_at, self.compat = attention, merge_at, compat
        self.exact_count = not (adaptive or compat)

    @property
    def needs(self) -> frozenset[str]:
        source = "tower_cls_query" if self.attention == "class" else "tower_received"
        return frozenset({"tower_keys", source, *(["projector"] * (self.merge_at == "features"))})

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (-1,)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.tower_keys_BLHVD is not None
        keys_BVC, valid_BV = tokens.tower_keys_BLHVD[:, 0].transpose(1, 2).flatten(2), tokens.valid_BV
        if self.attention == "class":
            assert tokens.tower_cls_query_BLHVD is not None
            query_BVC = tokens.tower_cls_query_BLHVD[:, 0].transpose(1, 2).flatten(2)
            attention_BV = class_attention(query_BVC, keys_BVC, valid_BV)
        else:
            attention_BV = saliency(tokens, self.attention)
        kept_BV = self._keep(attention_BV, valid_BV, num_keep_B)
        rest_BV = valid_BV & ~kept_BV
        extra_BV = keep_topk(attention_BV, rest_BV, torch.ones_like(num_keep_B))
        free = self.adaptive or (self.compat and self.plus)  # the count is not known on the host
        K = valid_BV.shape[1] if free else int(num_keep_B.max())
        index_BK, exists_BK = slots(kept_BV, K)
        extra_B1, has_B1 = slots(extra_BV, 1)
        weight_BKV = nearest(keys_BVC, index_BK, valid_BV, self.neighbours) * attention_BV[:, None]
        h_BVC = to_merge(tokens, self.merge_at)
        merged_BKC = take(h_BVC, index_BK) + weight_BKV @ h_BVC
        extra_B1C = (rest_BV * attention_BV)[:, None] @ h_BVC
        # With one token outside, the token of the rest would be that one, and nothing is lost that merging could save.
        lossy_B1 = rest_BV.sum(1, keepdim=True) > 1
        vision_BVD = put(
            tokens,
            self.merge_at,
            torch.cat([merged_BKC, extra_B1C], 1),
            torch.cat([index_BK, extra_B1], 1),
            torch.cat([exists_BK, has_B1], 1) & lossy_B1,
        )
        tier_BV = 2 * kept_BV.long() + extra_BV
        return Selection(kept_BV | extra_BV, in_tiers(tier_BV, attention_BV), vision_BVD=vision_BVD)

    def _keep(self, attention_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
        """The tokens that stay as themselves."""
        if self.adaptive:
            kept_BV = upper_outliers(attention_BV, valid_BV)
            return kept_BV | every_third(kept_BV, valid_BV) if self.plus else kept_BV
        if self.compat and self.plus:
            attended_B = num_keep_B // 2
            return keep_topk(attention_BV, valid_BV, attended_B) | official_places(valid_BV, on(attended_B, valid_BV))
        own_B = num_keep_B if self.compat else num_keep_B - 1
        spread_B = (own_B.double() * self.uniform * self.plus).floor().long()
        kept_BV = keep_topk(attention_BV, valid_BV, own_B - spread_B)
        return kept_BV | spread(valid_BV & ~kept_BV, on(spread_B, valid_BV))


def class_attention(query_BVC: Tensor, keys_BVC: Tensor, valid_BV: Tensor) -> Tensor:
    """Single-head attention of the class token to the patches of its row, fp32 (B, V); 0 on padding.

    Args:
        query_BVC: the class token's query, of each token's image or tile, heads side by side.
        keys_BVC: keys of the patches, heads side by side.
        valid_BV: bool (B, V).
    """
    logits_BV = (query_BVC.float() * keys_BVC.float()).sum(-1) * keys_BVC.shape[-1] ** -0.5
    return logits_BV.masked_fill(~valid_BV, -torch.inf).softmax(-1).masked_fill(~valid_BV, 0.0)


def upper_outliers(scores_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """bool (B, V): scores above Q3 + 1.5 (Q3 - Q1) of the valid tokens of their row (quartiles interpolated)."""
    sorted_BV = scores_BV.float().masked_fill(~valid_BV, torch.inf).sort(dim=1).values
    last_B1 = valid_BV.sum(1, keepdim=True) - 1
    quartiles = []
    for quarter in (1, 3):
        low_B1 = (last_B1 * quarter // 4).clamp(min=0)
        part_B1 = (last_B1 * quarter % 4) / 4
        high_B1 = (low_B1 + 1).minimum(last_B1.clamp(min=0))
        below_B1, above_B1 = sorted_BV.gather(1, low_B1), sorted_BV.gather(1, high_B1)
        quartiles.append(below_B1 + part_B1 * (above_B1 - below_B1))
    q1_B1, q3_B1 = quartiles
    return valid_BV & (scores_BV.float() > q3_B1 + 1.5 * (q3_B1 - q1_B1))


def every_third(outlier_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """bool (B, V): places 0, s, 2 s, ... below n - 1 of a row of n with o outliers, s = max(1, n // o // 3).

    None in a row without outliers. The end, which leaves out the last token, is that of the official code.
    """
    count_B1 = outlier_BV.sum(1, keepdim=True)
    stride_B1 = (valid_BV.sum(1, keepdim=True) // count_B1.clamp(min=1) // 3).clamp(min=1)
    place_BV, last_B1 = valid_BV.cumsum(1) - 1, valid_BV.sum(1, keepdim=True) - 1
    return valid_BV & (place_BV % stride_B1 == 0) & (place_BV < last_B1) & (count_B1 > 0)


def official_places(valid_BV: Tensor, count_B: Tensor) -> Tensor:
    """bool (B, V): places s // 2, s // 2 + s, ... below n - 1 of a row of n, s = n // count; none with a count of 0."""
    count_B1, size_B1 = count_B[:, None], valid_BV.sum(1, keepdim=True)
    stride_B1 = (size_B1 // count_B1.clamp(min=1)).clamp(min=1)
    place_BV = valid_BV.cumsum(1) - 1
    return valid_BV & (place_BV % stride_B1 == stride_B1 // 2) & (place_BV < size_B1 - 1) & (count_B1 > 0)


def spread(rest_BV: Tensor, count_B: Tensor) -> Tensor:
    """bool (B, V): `count` tokens of the M of a rest at even distances, places floor(i M / count) of its order."""
    size_B1, count_B1 = rest_BV.sum(1, keepdim=True), count_B[:, None].minimum(rest_BV.sum(1, keepdim=True))
    place_BV = rest_BV.cumsum(1) - 1
    # Place p is floor(i M / c) of some i < c where the count of such places up to p grows: ceil((p + 1) c / M) does.
    upto_BV, before_BV = (-(-(place_BV + one) * count_B1 // size_B1.clamp(min=1)) for one in (1, 0))
    return rest_BV & (upto_BV > before_BV)


def nearest(keys_BVC: Tensor, index_BK: Tensor, valid_BV: Tensor, num: int) -> Tensor:
    """bool (B, K, V): the `num` other valid tokens of nearest key (cosine) of each slot's token; ties: the earlier."""
    unit_BVC = F.normalize(keys_BVC.float(), dim=-1)
    token_V = torch.arange(keys_BVC.shape[1], device=keys_BVC.device)
    other_BKV = valid_BV[:, None] & (token_V != index_BK[..., None])
    cosine_BKV = (take(unit_BVC, index_BK) @ unit_BVC.mT).masked_fill(~other_BKV, -torch.inf)
    num = min(num, keys_BVC.shape[1])
    if num == 0:
        return torch.zeros_like(other_BKV)
    # The value of the last one in, as a sort of every row would cost most of the time.
    last_BK1 = cosine_BKV.topk(num, dim=-1).values[..., -1:]
    over_BKV, tied_BKV = cosine_BKV > last_BK1, cosine_BKV == last_BK1
    room_BK1 = num - over_BKV.sum(-1, keepdim=True)
    return (over_BKV | (tied_BKV & (tied_BKV.cumsum(-1) <= room_BK1))) & other_BKV
