"""VisPruner: retain attended patches, and of the rest those that duplicate others least (arXiv 2412.01818, section 4).

B rows, V tokens, W = V + 1, D width of the tower, N tokens left in a round, A and C its two sets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, on, rank
from tpcompress.pruners.tower_attention import SOURCES, check_share, check_source, in_tiers, saliency


class VisPruner(Pruner):
    """keep = top `important` T by attention + from the rest, round by round, what duplicates others least.

    A round lists what is left of the rest in the order of the sequence and deals it out to two sets in turn; in the
    first, dup(a) = max_b cos(h_a, h_b) over the second, and the `step` tokens of largest dup are deleted, fewer in the
    last round and where the first set is smaller. h are the features of the last but one layer of the tower.

    needs  tower_features, and tower_cls or tower_received (`attention`).     gives  keep_BV, scores_BV = (round of the
    deletion, attention).
    Paper: half of the budget by attention, 8 per round. Cost: one V x V Gram matrix in fp64, (V - T) / 8 rounds over
    the rows of a half of what is left.
    Unlike the official code: any number of tokens and any budget (there an odd rest is an error), a batch of different
    sizes, one important token at least unless `important` is 0 (there floor(T important)), the order of the sequence.
    `compat` deals the rest out as there, and takes no more than floor(T important): by falling attention at first, and
    then what is left of the first set, by falling dup, before the second.
    """

    name = "vispruner"
    paper = "2412.01818"
    group = "attention in the vision tower"
    paper_plan = """
    # VisPruner: 64 of LLaVA-1.5's 576 tokens, 32 by attention and the 32 that duplicate the others least; renumbered.
    stages:
      - {pruner: vispruner, keep_tokens: 64}
    positions: compact
    """
    test_arguments = (
        {"attention": "received", "important": 0.0, "step": 3},
        {"important": 0.7, "step": 1},
        {"compat": True},
    )

    def __init__(self, important: float = 0.5, step: int = 8, attention: str = "class", compat: bool = False) -> None:
        super().__init__()
        check_source(self.name, attention)
        check_share(self.name, "important", important)
        if step < 1:
            raise ValueError(f"vispruner deletes at least one token per round, got step {step}; give 1 or more.")
        self.important, self.step, self.attention, self.compat = important, step, attention, compat

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_features", SOURCES[self.attention]})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.tower_features_BLVD is not None
        attention_BV, valid_BV = saliency(tokens, self.attention), tokens.valid_BV
        first_B = (num_keep_B.double() * self.important).floor().long()
        first_B = first_B.clamp(min=int(self.important > 0 and not self.compat)).minimum(num_keep_B)
        important_BV = keep_topk(attention_BV, valid_BV, first_B)
        rest_BV = valid_BV & ~important_BV
        features_BVD, dealt_BV = tokens.tower_features_BLVD[:, 0], attention_BV if self.compat else None
        spared_BV, rounds = spare(features_BVD, rest_BV, first_B, num_keep_B, self.step, dealt_BV)
        keep_BV = important_BV | (rest_BV & (spared_BV == rounds))
        tier_BV = torch.where(important_BV, rounds + 1, spared_BV)
        return Selection(keep_BV, in_tiers(tier_BV, attention_BV))


def spare(
    features_BVD: Tensor,
    rest_BV: Tensor,
    first_B: Tensor,
    num_keep_B: Tensor,
    step: int,
    attention_BV: Tensor | None = None,
) -> tuple[Tensor, int]:
    """How many rounds each token of the rest outlives.

    Args:
        features_BVD: features of the tower.
        rest_BV: the tokens to delete from.
        first_B: int64 on the CPU, tokens of each row that are kept already and not in the rest.
        num_keep_B: int64 on the CPU, what shall be left of both together.
        step: deletions per round.
        attention_BV: deals out in the official order, of which it is the first; in the sequence's without it.

    Returns:
        int64 (B, V), the round of the deletion counted from 0, and the number of rounds, which is what the tokens have
        that outlive all. A round deletes min(`step`, what is too many, the first set) tokens; ties: the later ones.
    """
    B, V = rest_BV.shape
    widths = _widths(V, first_B, num_keep_B, step)
    # fp64 from the norm on: a rounding that depends on the padding would change what all later rounds compare.
    unit_BVD = F.normalize(features_BVD.double(), dim=-1)
    # One row more than there are tokens stands for none and is like nothing: a cosine is at least -1.
    cosine_BWV = F.pad((unit_BVD @ unit_BVD.mT).float(), (0, 0, 0, 1), value=-4.0)
    row_B1 = torch.arange(B, device=rest_BV.device)[:, None] * (V + 1)
    key_BV = torch.arange(V, device=rest_BV.device).expand(B, V)
    if attention_BV is not None:
        key_BV = rank(attention_BV, rest_BV)
    goal_B, left_BV, spared_BV = on(num_keep_B - first_B, rest_BV), rest_BV, torch.zeros_like(rest_BV).long()
    for N in widths:
        index_BN = key_BV.masked_fill(~left_BV, 2 * V).argsort(dim=1, stable=True)[:, :N]
        left_BN = left_BV.gather(1, index_BN)
        first_BA, left_BA = index_BN[:, ::2], left_BN[:, ::2]
        second_BC = F.pad(index_BN.masked_fill(~left_BN, V)[:, 1::2], (0, 1), value=V) + row_B1
        # Whole rows of the second set, as the matrix is symmetric: they lie in one piece.
        dup_BV = cosine_BWV.flatten(0, 1).index_select(0, second_BC.flatten()).view(B, -1, V).amax(1)
        size_B = left_BA.sum(1)
        many_B = (left_BN.sum(1) - goal_B).clamp(min=0, max=step).minimum(size_B)
        dup_BA = dup_BV.gather(1, first_BA)
        left_BV = left_BV.scatter(1, first_BA, keep_topk(-dup_BA, left_BA, size_B - many_B))
        if attention_BV is not None:
            behind_BN = torch.arange(V, V + N, device=key_BV.device).expand(B, N)
            key_BV = key_BV.scatter(1, index_BN, behind_BN).scatter(1, first_BA, rank(dup_BA, left_BA))
        spared_BV = spared_BV + left_BV
    return spared_BV, len(widths)


def _widths(V: int, first_B: Tensor, num_keep_B: Tensor, step: int) -> list[int]:
    """The most tokens of the rest that any row can have at the start of each round; V valid ones have the most."""
    left_B, goal_B, widths = (V - first_B).clamp(min=0), num_keep_B - first_B, []
    while bool((left_B > goal_B).any()):
        widths.append(int(left_B.max()))
        left_B = (left_B - step).maximum(left_B // 2).maximum(goal_B).minimum(left_B)
    return widths
