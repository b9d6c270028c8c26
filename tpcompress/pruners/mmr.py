"""MMR: any rule's importance against the similarity to what is retained already (IDPruner, arXiv 2602.13315)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import TOWER_LAYERS, Pruner, Selection, TokenView
from tpcompress.pruners.combinators import Composed, places
from tpcompress.pruners.greedy import Criterion, first_picks, products
from tpcompress.pruners.merging import metric_of
from tpcompress.pruners.topk import SAME, rank

FEATURES = {"tokens": frozenset[str](), "keys": frozenset({"tower_keys"}), "tower": frozenset({"tower_features"})}
"""What similarity is measured on, and the view of it."""


class MMR(Composed):
    """First pick argmax_i w_i, each later one argmax_i alpha w_i - (1 - alpha) max_{j in S} cos(x_i, x_j).

    w = (r - min r) / (max r - min r + 1e-6), r the scores of `pruner`; alpha is the paper's lambda. x = the tokens at
    the stage (`feature: tokens`), or the tower's keys or features. alpha = 1 is the inner rule's own top-k; alpha = 0
    takes the farthest point each time. With `per_round` q > 1 the q best are picked at once, without regard to each
    other, in k / q rounds. A smaller budget is the first part of a larger one.
    A rule that learns, as in the paper, trains through its own gates, on its scores in the order of the picks.

    needs  what the inner rule needs, and the view of `feature`.
    gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last); with a rule that learns, its scores in the
    order of the picks.
    Paper: the trained scorer of VisionSelector on Qwen2.5-VL, lambda 0.5, features at the language model's input.
    Cost: one run of the inner rule at full budget, and V products of width D per pick.
    Unlike the official code: min and max are those of a budget row, an image unless the plan says `scope: prompt`,
    there of all images of a prompt; batched; ties go to the earlier token. Ours: training with the picks in the loop
    (there the scorer is trained alone), inner rules without training, features of the tower.
    """

    name = "mmr"
    paper = "2602.13315"
    only_rank = True
    group = "combination of pruners"
    paper_plan = """
    # IDPruner: a trained gate's importance against similarity, 10 % of the tokens of Qwen2.5-VL before the language
    # model.
    stages:
      - pruner: {type: mmr, pruner: learned_gate, alpha: 0.5}
        layer: 0
        keep_ratio: 0.1
    """
    test_arguments = (
        {"pruner": {"type": "novelty"}, "alpha": 0.8, "per_round": 3},
        {"pruner": {"type": "fastervlm"}, "feature": "tower"},
        {"pruner": {"type": "learned_gate"}},
        {"pruner": {"type": "learned_gate", "selector": "straight_through", "applier": "gather_value"}, "alpha": 0.3},
    )

    def __init__(
        self,
        pruner: Pruner | str | dict[str, Any] = "fastv",
        alpha: float = 0.5,
        feature: str = "tokens",
        per_round: int = 1,
    ) -> None:
        super().__init__(pruner=pruner)
        if not 0 <= alpha <= 1:
            raise ValueError(f"mmr needs alpha in [0, 1], the weight of importance, got {alpha}.")
        if feature not in FEATURES:
            raise ValueError(f"mmr has no feature '{feature}'; choose one of {', '.join(FEATURES)}.")
        if per_round < 1:
            raise ValueError(f"mmr picks at least one token per round, got per_round = {per_round}.")
        self.alpha, self.feature, self.per_round = alpha, feature, per_round
        self.adopt()

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | FEATURES[self.feature]

    @property
    def tower_layers(self) -> tuple[int, ...]:
        layers = super().tower_layers
        return tuple(dict.fromkeys((*layers, *TOWER_LAYERS))) if FEATURES[self.feature] else layers

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        if self.learned:
            return super().forward(tokens, num_keep_B)
        with torch.no_grad():
            order_BV, _ = self._picks(tokens, self.ranked(self.parts[0], tokens), num_keep_B)
            return first_picks(order_BV, tokens.valid_BV, num_keep_B)

    def order(self, tokens: TokenView, scores_BV: Tensor, num_keep_B: Tensor) -> Tensor:
        order_BV, left_BV = self._picks(tokens, scores_BV, num_keep_B)
        return places(order_BV, rank(left_BV, tokens.valid_BV))

    def _picks(self, tokens: TokenView, scores_BV: Tensor, num_keep_B: Tensor) -> tuple[Tensor, Tensor]:
        """Order of the picks, and what each token was worth in the end."""
        most = min(int(num_keep_B.max()), tokens.valid_BV.shape[1])
        x_BVD = tokens.vision_BVD.detach().float()
        layer = self.tower_layers.index(TOWER_LAYERS[0]) if FEATURES[self.feature] else 0
        if self.feature == "keys":
            x_BVD = metric_of(tokens, "keys", layer)
        elif self.feature == "tower":
            assert tokens.tower_features_BLVD is not None
            x_BVD = tokens.tower_features_BLVD[:, layer].detach().float()
        return marginal_picks(x_BVD, scores_BV, tokens.valid_BV, most, self.alpha, self.per_round)


def marginal_picks(
    x_BVD: Tensor, scores_BV: Tensor, valid_BV: Tensor, num_picks: int, alpha: float = 0.5, per_round: int = 1
) -> tuple[Tensor, Tensor]:
    """Greedy picks by importance and by distance to earlier picks.

    Args:
        x_BVD: features, fp32.
        scores_BV: importance, of any scale.
        valid_BV: bool (B, V); padding is never picked.
        num_picks: how many picks to make; rows with fewer valid tokens stop when they have none left.
        alpha: weight of importance, in [0, 1].
        per_round: picks that are made at once.

    Returns:
        int64 (B, V): 0 for the first pick, 1 for the next, ...; V for tokens never picked. Ties: the earlier token.
        And fp32 (B, V): what each token is worth after the last pick.
    """
    B, V = valid_BV.shape
    criterion = _Marginal(x_BVD, scores_BV, valid_BV, alpha)
    order_BV, open_BV = torch.full((B, V), V, device=valid_BV.device), valid_BV.clone()
    for first in range(0, num_picks, per_round):
        count = min(per_round, num_picks - first)
        if per_round == 1:
            pick_BM = criterion.best(open_BV)
        else:
            pick_BM = rank(criterion.score(open_BV), open_BV).argsort(1)[:, :count]
        place_M = torch.arange(first, first + count, device=valid_BV.device)
        # A row that has run out of tokens answers anything.
        order_BV.scatter_(1, pick_BM, torch.where(open_BV.gather(1, pick_BM), place_M, order_BV.gather(1, pick_BM)))
        open_BV.scatter_(1, pick_BM, False)
        for pick_B1 in pick_BM.split(1, dim=1):
            criterion.take(pick_B1)
    return order_BV, criterion.score(open_BV)


class _Marginal(Criterion):
    """alpha w - (1 - alpha) times the largest cosine to a pick; before the first pick, w."""

    def __init__(self, x_BVD: Tensor, scores_BV: Tensor, valid_BV: Tensor, alpha: float) -> None:
        scores_BV = scores_BV.detach().float()
        low_B1 = scores_BV.masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True)
        high_B1 = scores_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True)
        self.weight_BV = ((scores_BV - low_B1) / (high_B1 - low_B1 + 1e-6)).masked_fill(~valid_BV, 0.0)
        self.unit_BVD, self.alpha = F.normalize(x_BVD, dim=-1), alpha
        self.nearest_BV: Tensor | None = None

    def score(self, open_BV: Tensor) -> Tensor:
        if self.nearest_BV is None:
            return self.weight_BV
        return self.alpha * self.weight_BV - (1 - self.alpha) * self.nearest_BV

    def take(self, pick_B1: Tensor) -> None:
        index_BD = pick_B1.expand(-1, self.unit_BVD.shape[-1])
        similar_BV = products(self.unit_BVD, self.unit_BVD.gather(1, index_BD[:, None])[:, 0])
        similar_BV = similar_BV.masked_fill(similar_BV > 1 - SAME, 1.0)
        self.nearest_BV = similar_BV if self.nearest_BV is None else self.nearest_BV.maximum(similar_BV)
