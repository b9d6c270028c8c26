"""ToMe: merge the most similar tokens, pair by pair, until the budget is left (arXiv 2210.09461, section 3)."""

from __future__ import annotations

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


class ToMe(Pruner):
    """In rounds: tokens in turn to A and C (the paper's B); a -> argmax_c cos(m_a, m_c); join the r most similar pairs.

    x_c = sum of s_i x_i / sum of s_i over the pair, s_c = sum of s_i: a retained token holds the mean of all that it
    stands for, at its own position. r is the same in each of the `rounds`, (V - budget) / rounds to within one, but
    at most half of what is left; further rounds follow where that is too little for the budget. m is the token itself
    (`metric: features`) or the mean over heads of its keys in the vision tower (`metric: keys`). With `proportional`,
    layers after the stage add log s to the logits of each key.

    needs  nothing, or tower_keys with keys.     gives  keep_BV, vision_BVD, size_BV, scores_BV = 1 - the similarity by
    which a dropped token was merged; 3 for retained ones.
    Paper: keys, proportional attention, and the same r in every layer of the tower, of which LLaVA-1.5's has 24: hence
    24 rounds. Here `features` are the default, which every family has.
    Cost: a product of N/2 x N/2 per round, N tokens left; `rounds: 1` halves them each time, which is quickest, and
    then joins pairs that are far apart.
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
    group = "merging"
    paper_plan = """
    # ToMe, here all at once before the language model: LLaVA-1.5's 576 tokens merged pair by pair into 64, with
    # attention in proportion to what each stands for. The paper merges in every layer of the tower, by its keys
    # (metric: keys).
    stages:
      - {pruner: tome, layer: 0, keep_tokens: 64}
    """
    test_arguments = (
        {"metric": "keys"},
        {"proportional": False, "rounds": 1},
    )

    def __init__(self, metric: str = "features", proportional: bool = True, rounds: int = 24) -> None:
        super().__init__()
        check_metric(self.name, metric)
        check_rounds(self.name, rounds)
        self.metric, self.proportional, self.rounds = metric, proportional, rounds
        self.uses_token_sizes = proportional

    @property
    def needs(self) -> frozenset[str]:
        return METRICS[self.metric]

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        metric_BVD = metric_of(tokens, self.metric)
        keep_BV, group_BV, joined_BV = bipartite(metric_BVD, tokens.valid_BV, num_keep_B, self.rounds)
        vision_BVD = merge_groups(tokens.vision_BVD, group_BV, keep_BV, int(num_keep_B.max()))
        size_BV = group_sizes(group_BV).clamp(min=1).float() if self.proportional else None
        return Selection(keep_BV, (1 - joined_BV).clamp(max=3.0), vision_BVD=vision_BVD, size_BV=size_BV)
