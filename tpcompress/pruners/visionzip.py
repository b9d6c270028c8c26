"""VisionZip: retain attended patches, and merge the rest into a few contextual ones (arXiv 2412.04467, section 3).

B rows, V tokens, K contextual slots, C width of what is merged, d width of the tower's keys.
"""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.merging import metric_of, nearest_kept
from tpcompress.pruners.topk import keep_topk, on, slots, take
from tpcompress.pruners.tower_attention import (
    SOURCES,
    check_merge_at,
    check_share,
    check_source,
    in_tiers,
    put,
    saliency,
    to_merge,
)


class VisionZip(Pruner):
    """keep = top T - C by attention + C targets at every (M // C)-th of the M others; C = round(T contextual).

    Every other token joins the target of most similar key (cosine of the head-mean keys), and a target becomes
    h_target + mean of h over those that joined it: the sum of the paper's listing, not the mean of both. A target that
    no token joins stays as it is, so a budget of all tokens changes none.

    needs  tower_keys, tower_cls or tower_received (`attention`), projector with `merge_at: features`.
    gives  keep_BV, scores_BV = (dominant, target or dropped; attention), vision_BVD with the merged targets.
    Paper: 54 + 10 tokens of 576 (the same shares at 128 and 192), layer -2, merging what the projector is given; new
    values are projector(merged). `merge_at: tokens` merges after the projector: where that is not token-wise, and at
    layers after the first.
    Cost: V x C cosines. Unlike the official code: any count, one more patch in place of the class token, which the
    official code sends to the language model as one of its dominant tokens (here it has no position); targets stand at
    their own places (there after all dominant ones); the budget is one image's (there tile by tile); no class of the
    process is changed. `compat` retains the official patches: one less, since the class token took a slot.
    """

    name = "visionzip"
    paper = "2412.04467"
    merges = True
    group = "attention in the vision tower"
    paper_plan = """
    # VisionZip: 64 of LLaVA-1.5's 576 tokens, 54 dominant and 10 that the others are merged into; renumbered.
    stages:
      - {pruner: visionzip, keep_tokens: 64}
    positions: compact
    """
    test_arguments = (
        {"attention": "received", "merge_at": "tokens", "contextual": 0.5},
        {"contextual": 1.0},
    )
    inexact_arguments = ({"compat": True},)

    def __init__(
        self,
        contextual: float = 0.15625,
        attention: str = "class",
        merge_at: str = "features",
        compat: bool = False,
    ) -> None:
        super().__init__()
        check_source(self.name, attention)
        check_merge_at(self.name, merge_at)
        check_share(self.name, "contextual", contextual)
        self.contextual, self.attention, self.merge_at, self.compat = contextual, attention, merge_at, compat
        self.exact_count = not compat

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_keys", SOURCES[self.attention], *(["projector"] * (self.merge_at == "features"))})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        attention_BV, valid_BV = saliency(tokens, self.attention), tokens.valid_BV
        targets_B = (num_keep_B.double() * self.contextual + 0.5).floor().long().minimum(num_keep_B - 1)
        dominant_BV = keep_topk(attention_BV, valid_BV, num_keep_B - targets_B - int(self.compat))
        target_BV = every_nth(valid_BV & ~dominant_BV, on(targets_B, valid_BV))
        K = max(int(targets_B.max()), 1)
        index_BK, exists_BK = slots(target_BV, K)
        others_BV = valid_BV & ~dominant_BV & ~target_BV
        weight_BKV = joins(metric_of(tokens, "keys"), target_BV, others_BV, K)
        h_BVC = to_merge(tokens, self.merge_at)
        merged_BKC = take(h_BVC, index_BK) + weight_BKV @ h_BVC
        changed_BK = exists_BK & (weight_BKV > 0).any(-1)
        vision_BVD = put(tokens, self.merge_at, merged_BKC, index_BK, changed_BK)
        tier_BV = 2 * dominant_BV.long() + target_BV
        return Selection(dominant_BV | target_BV, in_tiers(tier_BV, attention_BV), vision_BVD=vision_BVD)


def every_nth(rest_BV: Tensor, count_B: Tensor) -> Tensor:
    """The first `count` of every (M // count)-th of the M tokens of a rest, in the order of the sequence.

    Args:
        rest_BV: bool (B, V).
        count_B: int64 (B,) on the same device.

    Returns:
        bool (B, V) with `count` True per row, or M where there are fewer.
    """
    count_B1 = count_B[:, None]
    step_B1 = (rest_BV.sum(1, keepdim=True) // count_B1.clamp(min=1)).clamp(min=1)
    place_BV = rest_BV.cumsum(1) - 1
    return rest_BV & (place_BV % step_B1 == 0) & (place_BV // step_B1 < count_B1)


def joins(keys_BVd: Tensor, target_BV: Tensor, others_BV: Tensor, num: int) -> Tensor:
    """Weights that average, for each target, the others whose most similar target it is; ties: the earlier target.

    Args:
        keys_BVd: what similarity is measured on (cosine).
        target_BV: the tokens that are targets.
        others_BV: the tokens that join.
        num: K, no fewer than any row has targets, 1 at least; known on the host.

    Returns:
        fp32 (B, K, V): row k holds 1 / members on the members of the k-th target, nothing but 0 if it has none.
    """
    index_BK, exists_BK = slots(target_BV, num)
    group_BV, _ = nearest_kept(keys_BVd, target_BV, others_BV, num)
    member_BKV = (group_BV[:, None] == index_BK[..., None]) & others_BV[:, None] & exists_BK[..., None]
    return member_BKV / member_BKV.sum(-1, keepdim=True).clamp(min=1)
