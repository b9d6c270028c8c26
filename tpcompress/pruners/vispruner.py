"""VisPruner: retain attended patches, and of the rest those that duplicate others least (arXiv 2412.01818, section 4).

B rows, V tokens, N tokens left in the longest row, C width of the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.saliency import SOURCES, check_share, check_source, in_tiers, saliency, slots
from tpcompress.pruners.topk import keep_topk, on


class VisPruner(Pruner):
    """keep = top `important` T by attention + from the rest, round by round, what duplicates others least.

    A round lists what is left of the rest in the order of the sequence and deals it out to two sets in turn; in the
    first, dup(a) = max_b cos(h_a, h_b) over the second, and the `step` tokens of largest dup are deleted, fewer in the
    last round and where the first set is smaller. h are the features of the last but one layer of the tower.

    needs  tower_features, and tower_cls or tower_received (`attention`).     gives  keep_BV, scores_BV = (round of the
    deletion, attention).
    Paper: half of the budget by attention, 8 per round. Cost: one V x V Gram matrix, (V - T) / 8 rounds of V^2 / 4.
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
        first_B = (
            (num_keep_B.double() * self.important).floor().long().clamp(min=int(self.important > 0)).minimum(num_keep_B)
        )
        important_BV = keep_topk(attention_BV, valid_BV, first_B)
        rest_BV = valid_BV & ~important_BV
        spared_BV, rounds = spare(tokens.tower_features_BLVD[:, 0], rest_BV, first_B, num_keep_B, self.step)
        keep_BV = important_BV | (rest_BV & (spared_BV == rounds))
        tier_BV = torch.where(important_BV, rounds + 1, spared_BV)
        return Selection(keep_BV, in_tiers(tier_BV, attention_BV))


def spare(features_BVC: Tensor, rest_BV: Tensor, first_B: Tensor, num_keep_B: Tensor, step: int) -> tuple[Tensor, int]:
    """How many rounds each token of the rest outlives.

    Args:
        features_BVC: features of the tower.
        rest_BV: the tokens to delete from.
        first_B: int64 on the CPU, tokens of each row that are kept already and not in the rest.
        num_keep_B: int64 on the CPU, what shall be left of both together.
        step: deletions per round.

    Returns:
        int64 (B, V), the round of the deletion counted from 0, and the number of rounds, which is what the tokens have
        that outlive all. A round deletes min(`step`, what is too many, the first set) tokens; ties: the later ones.
    """
    V = rest_BV.shape[1]
    lengths = _lengths(V, first_B, num_keep_B, step)
    unit_BVC = F.normalize(features_BVC.float(), dim=-1)
    cosine_BVV = unit_BVC @ unit_BVC.mT
    goal_B, left_BV, spared_BV = on(num_keep_B - first_B, features_BVC), rest_BV, torch.zeros_like(rest_BV).long()
    for length in lengths:
        index_BN, exists_BN = slots(left_BV, length)
        a_BN, b_BN, real_BN, other_BN = index_BN[:, ::2], index_BN[:, 1::2], exists_BN[:, ::2], exists_BN[:, 1::2]
        cosine_BNV = cosine_BVV.gather(1, a_BN[..., None].expand(-1, -1, V))
        cosine_BNN = cosine_BNV.gather(2, b_BN[:, None].expand(-1, a_BN.shape[1], -1))
        # Without a second set nothing is duplicated: the floor, which a row of one token meets.
        dup_BN = F.pad(cosine_BNN.masked_fill(~other_BN[:, None], -2.0), (0, 1), value=-2.0).amax(-1)
        size_B = real_BN.sum(1)
        many_B = (left_BV.sum(1) - goal_B).clamp(min=0, max=step).minimum(size_B)
        deleted_BN = real_BN & ~keep_topk(-dup_BN, real_BN, size_B - many_B)
        left_BV = left_BV & ~torch.zeros_like(left_BV).scatter(1, a_BN, deleted_BN)
        spared_BV = spared_BV + left_BV
    return spared_BV, len(lengths)


def _lengths(V: int, first_B: Tensor, num_keep_B: Tensor, step: int) -> list[int]:
    """Tokens left before each round in the longest row that V allows: no row needs more rounds, or more places."""
    left_B, lengths = (V - first_B).clamp(min=0), []
    goal_B = num_keep_B - first_B
    while bool((left_B > goal_B).any()):
        lengths.append(int(left_B.max()))
        left_B = (left_B - step).maximum(left_B // 2).maximum(goal_B).minimum(left_B)
    return lengths
