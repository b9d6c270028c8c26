"""ToMe: merge the most similar tokens, pair by pair, until the budget is left (arXiv 2210.09461, section 3)."""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.merge import METRICS, bipartite, check_metric, group_sizes, merge_groups, metric_of


class ToMe(Pruner):
    """In rounds: tokens in turn to A and C (the paper's B); a -> argmax_c cos(m_a, m_c); join the r most similar pairs.

    x_c = sum of s_i x_i / sum of s_i over the pair, s_c = sum of s_i: a retained token holds the mean of all that it
    stands for, at its own position. r = min(left - budget, left // 2), so ceil(log2(V / budget)) rounds reach any
    budget exactly. m is the token itself (`metric: features`) or the mean over heads of its keys in the vision tower
    (`metric: keys`). With `proportional`, layers behind the stage add log s to the logits of each key.

    needs  nothing, or tower_keys with keys.     gives  keep_BV, vision_BVD, size_BV, scores_BV = 1 - the similarity by
    which a dropped token was merged; 3 for retained ones.
    Paper: keys, proportional attention; here `features` are the default, which every family has.
    Cost: a product of V/2 x V/2 in the first round, a quarter in each one after it.
    A mean is closer to everything than its members are: tokens that share a mean and form no clusters, as random
    numbers do, end up in one large group.
    Unlike the official code: all at once at the stage, where it merges r tokens between attention and MLP of every
    tower layer and has new keys in each; a merged token's metric is the size-weighted mean instead. Tokens stay in the
    order of their positions (there those of A first, then those of C, so that its next round deals them otherwise).
    Batched, padding-safe; no class token to protect.
    """

    name = "tome"
    paper = "2210.09461"
    merges = True

    def __init__(self, metric: str = "features", proportional: bool = True) -> None:
        super().__init__()
        check_metric(self.name, metric)
        self.metric, self.proportional = metric, proportional
        self.calibrates = proportional

    @property
    def needs(self) -> frozenset[str]:
        return METRICS[self.metric]

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        keep_BV, group_BV, joined_BV = bipartite(metric_of(tokens, self.metric), tokens.valid_BV, num_keep_B)
        vision_BVD = merge_groups(tokens.vision_BVD, group_BV, keep_BV, int(num_keep_B.max()))
        size_BV = group_sizes(group_BV).clamp(min=1).float() if self.proportional else None
        return Selection(keep_BV, (1 - joined_BV).clamp(max=3.0), vision_BVD=vision_BVD, size_BV=size_BV)
