"""VisPruner: retain attended patches, and of the rest those that duplicate others least (arXiv 2412.01818, section 4).

B rows, V tokens, C width of the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.saliency import SOURCES, check_share, check_source, in_tiers, saliency
from tpcompress.pruners.topk import keep_topk, on


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
    rounds = _rounds(rest_BV.shape[1], first_B, num_keep_B, step)
    unit_BVC = F.normalize(features_BVC.float(), dim=-1)
    cosine_BVV = unit_BVC @ unit_BVC.mT
    goal_B, left_BV, spared_BV = on(num_keep_B - first_B, features_BVC), rest_BV, torch.zeros_like(rest_BV).long()
    for _ in range(rounds):
        second_BV = left_BV & (left_BV.cumsum(1) % 2 == 0)
        first_BV = left_BV & ~second_BV
        # A cosine is at least -1, so a shift by 4 hides what is not in the second set.
        dup_BV = (cosine_BVV + torch.where(second_BV, 0.0, -4.0)[:, None]).amax(-1)
        size_B = first_BV.sum(1)
        many_B = (left_BV.sum(1) - goal_B).clamp(min=0, max=step).minimum(size_B)
        left_BV = second_BV | keep_topk(-dup_BV, first_BV, size_B - many_B)
        spared_BV = spared_BV + left_BV
    return spared_BV, rounds


def _rounds(V: int, first_B: Tensor, num_keep_B: Tensor, step: int) -> int:
    """Rounds of the longest row that V allows: a row of fewer tokens needs no more."""
    left_B, goal_B, rounds = (V - first_B).clamp(min=0), num_keep_B - first_B, 0
    while bool((left_B > goal_B).any()):
        left_B = (left_B - step).maximum(left_B // 2).maximum(goal_B).minimum(left_B)
        rounds += 1
    return rounds
