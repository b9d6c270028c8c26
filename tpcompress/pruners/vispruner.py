"""VisPruner: retain attended patches, and of the rest those that duplicate others least (arXiv 2412.01818, section 4).

B rows, V tokens, W = V + 1, D width of the tower, N tokens left in a round, A and C its two sets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.saliency import SOURCES, check_share, check_source, in_tiers, saliency
from tpcompress.pruners.topk import keep_topk, on, slots


class VisPruner(Pruner):
    """keep = top `important` T by attention + from the rest, round by round, what duplicates others least.

    A round lists what is left of the rest in the order of the sequence and deals it out to two sets in turn; in the
    first, dup(a) = max_b cos(h_a, h_b) over the second, and the `step` tokens of largest dup are deleted, fewer in the
    last round and where the first set is smaller. h are the features of the last but one layer of the tower.

    needs  tower_features, and tower_cls or tower_received (`attention`).     gives  keep_BV, scores_BV = (round of the
    deletion, attention).
    Paper: half of the budget by attention, 8 per round. Cost: one V x V Gram matrix, (V - T) / 8 rounds of V x V.
    Unlike the official code: any number of tokens and any budget (there an odd rest is an error), a batch of different
    sizes, the important tokens are floor(T important), one at least unless `important` is 0, order of the sequence in
    each new round.
    """

    name = "vispruner"
    paper = "2412.01818"

    def __init__(self, important: float = 0.5, step: int = 8, attention: str = "class") -> None:
        super().__init__()
        check_source(self.name, attention)
        check_share(self.name, "important", important)
        if step < 1:
            raise ValueError(f"vispruner deletes at least one token per round, got step {step}; give 1 or more.")
        self.important, self.step, self.attention = important, step, attention

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_features", SOURCES[self.attention]})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.tower_features_BLVD is not None
        attention_BV, valid_BV = saliency(tokens, self.attention), tokens.valid_BV
        first_B = (num_keep_B.double() * self.important).floor().long()
        first_B = first_B.clamp(min=int(self.important > 0)).minimum(num_keep_B)
        important_BV = keep_topk(attention_BV, valid_BV, first_B)
        rest_BV = valid_BV & ~important_BV
        spared_BV, rounds = spare(tokens.tower_features_BLVD[:, 0], rest_BV, first_B, num_keep_B, self.step)
        keep_BV = important_BV | (rest_BV & (spared_BV == rounds))
        tier_BV = torch.where(important_BV, rounds + 1, spared_BV)
        return Selection(keep_BV, in_tiers(tier_BV, attention_BV))


def spare(features_BVD: Tensor, rest_BV: Tensor, first_B: Tensor, num_keep_B: Tensor, step: int) -> tuple[Tensor, int]:
    """How many rounds each token of the rest outlives.

    Args:
        features_BVD: features of the tower.
        rest_BV: the tokens to delete from.
        first_B: int64 on the CPU, tokens of each row that are kept already and not in the rest.
        num_keep_B: int64 on the CPU, what shall be left of both together.
        step: deletions per round.

    Returns:
        int64 (B, V), the round of the deletion counted from 0, and the number of rounds, which is what the tokens have
        that outlive all. A round deletes min(`step`, what is too many, the first set) tokens; ties: the later ones.
    """
    B, V = rest_BV.shape
    widths = _widths(V, first_B, num_keep_B, step)
    # In fp64: one rounding that falls otherwise beside longer rows would change what all later rounds compare.
    unit_BVD = F.normalize(features_BVD.float(), dim=-1).double()
    # One row more than there are tokens stands for none and is like nothing: a cosine is at least -1.
    cosine_BWV = F.pad((unit_BVD @ unit_BVD.mT).float(), (0, 0, 0, 1), value=-4.0)
    row_B1 = torch.arange(B, device=rest_BV.device)[:, None] * (V + 1)
    goal_B, left_BV, spared_BV = on(num_keep_B - first_B, rest_BV), rest_BV, torch.zeros_like(rest_BV).long()
    for N in widths:
        index_BN, left_BN = slots(left_BV, N)
        first_BA, left_BA = index_BN[:, ::2], left_BN[:, ::2]
        second_BC = F.pad(index_BN.masked_fill(~left_BN, V)[:, 1::2], (0, 1), value=V) + row_B1
        # Whole rows of the second set, as the matrix is symmetric: they lie in one piece.
        dup_BV = cosine_BWV.flatten(0, 1).index_select(0, second_BC.flatten()).view(B, -1, V).amax(1)
        size_B = left_BA.sum(1)
        many_B = (left_BN.sum(1) - goal_B).clamp(min=0, max=step).minimum(size_B)
        stays_BA = keep_topk(-dup_BV.gather(1, first_BA), left_BA, size_B - many_B)
        left_BV = left_BV.scatter(1, first_BA, stays_BA)
        spared_BV = spared_BV + left_BV
    return spared_BV, len(widths)


def _widths(V: int, first_B: Tensor, num_keep_B: Tensor, step: int) -> list[int]:
    """The most tokens of the rest that any row can have at the start of each round; V valid ones have the most."""
    left_B, goal_B, widths = (V - first_B).clamp(min=0), num_keep_B - first_B, []
    while bool((left_B > goal_B).any()):
        widths.append(int(left_B.max()))
        left_B = (left_B - step).maximum(left_B // 2).maximum(goal_B).minimum(left_B)
    return widths
