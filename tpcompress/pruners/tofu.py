"""ToFu: prune or merge the most similar tokens, merged ones with their norm (arXiv 2312.01026, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.merging import (
    METRICS,
    bipartite,
    check_metric,
    check_rounds,
    group_sizes,
    merge_groups,
    metric_of,
)

MODES = ("prune", "merge")


class ToFu(Pruner):
    """Pairs as ToMe finds them; `mode: prune` drops one token of each pair, `mode: merge` joins them by MLERP:

    x_group = max_i ||x_i|| * mean_i x_i / ||mean_i x_i||: the direction of the mean with the largest norm, because a
    plain mean is shorter than what it is made of.

    The paper's hybrid prunes in early layers, whose answer to an interpolated input is far from linear, and merges in
    late ones. Stages are independent, so hybrid is a plan: one stage in mode prune, a later one in mode
    merge. `metric`, `proportional` and `rounds` as in `tome`; a pruned token counts for no size.

    needs  nothing, or tower_keys with keys.     gives  keep_BV, scores_BV = 1 - the similarity by which a dropped
    token was paired, 3 for retained ones; in mode merge vision_BVD and size_BV.
    Paper: keys, in every layer of a ViT, pruning in its first half; here `features` are the default, as in `tome`.
    Cost: that of `tome`; in mode merge also a norm of each token.
    Unlike the official code: none was found. Ours: all at once at the stage; MLERP once over all that a token
    stands for, where layer after layer would weigh late members more; the mean over a group goes on as its metric in
    mode merge, the retained token's own in mode prune; proportional attention kept from ToMe.
    """

    name = "tofu"
    paper = "2312.01026"
    group = "merging"
    paper_plan = """
    # ToFu's hybrid: drop one of each pair of similar tokens early, merge pairs at their norm later; 192, then 64 of
    # LLaVA-1.5's 576 tokens. The paper changes over in the middle of a ViT.
    stages:
      - {pruner: {type: tofu, mode: prune}, layer: 2, keep_tokens: 192}
      - {pruner: tofu, layer: 16, keep_tokens: 64}  # mode: merge
    """
    test_arguments = (
        {"mode": "prune"},
        {"metric": "keys", "proportional": False, "rounds": 3},
    )

    def __init__(
        self, mode: str = "merge", metric: str = "features", proportional: bool = True, rounds: int = 24
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(
                f"tofu has no mode '{mode}'; choose one of {', '.join(MODES)} (hybrid: an early stage prunes, a late "
                f"one merges)."
            )
        check_metric(self.name, metric)
        check_rounds(self.name, rounds)
        self.mode, self.metric, self.proportional, self.rounds = mode, metric, proportional, rounds
        self.merges = mode == "merge"
        self.uses_token_sizes = self.merges and proportional

    @property
    def needs(self) -> frozenset[str]:
        return METRICS[self.metric]

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        metric_BVD = metric_of(tokens, self.metric)
        keep_BV, group_BV, joined_BV = bipartite(metric_BVD, tokens.valid_BV, num_keep_B, self.rounds, self.merges)
        scores_BV = (1 - joined_BV).clamp(max=3.0)
        if not self.merges:
            return Selection(keep_BV, scores_BV)
        vision_BVD = mlerp(tokens.vision_BVD, group_BV, keep_BV, int(num_keep_B.max()))
        size_BV = group_sizes(group_BV).clamp(min=1).float() if self.proportional else None
        return Selection(keep_BV, scores_BV, vision_BVD=vision_BVD, size_BV=size_BV)


def mlerp(x_BVD: Tensor, group_BV: Tensor, keep_BV: Tensor, num_keep: int) -> Tensor:
    """The mean of each group at the largest norm among its members; tokens of no group stay as they are, bit for bit.

    Args:
        x_BVD: values to merge.
        group_BV: the token that each one's group goes by.
        keep_BV: the retained tokens.
        num_keep: no fewer than any row retains; known on the host.

    Returns:
        (B, V, D) in the dtype of `x_BVD`; a group whose mean is 0 has no direction and stays 0.
    """
    mean_BVD = merge_groups(x_BVD.float(), group_BV, keep_BV, num_keep)
    norm_BV = x_BVD.float().norm(dim=-1)
    largest_BV = norm_BV.scatter_reduce(1, group_BV, norm_BV, "amax")
    merged_BVD = F.normalize(mean_BVD, dim=-1) * largest_BV[..., None]
    return torch.where((group_sizes(group_BV) > 1)[..., None], merged_BVD.to(x_BVD.dtype), x_BVD)
