"""SCOPE: retain salient tokens that together resemble all others (arXiv 2510.24214, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.greedy import Coverage, cosines, first_picks, greedy
from tpcompress.pruners.tower_attention import SOURCES, check_source, saliency

FEATURES = ("tower", "tokens")


class SCOPE(Pruner):
    """Greedy argmax_i a_i^alpha sum_j max(0, s(i, j) - c_j), with c_j = max(0, max_{k in S} s(k, j)).

    s = cosine of the tower's features (`feature: tower`; `tokens` = of the vision tokens themselves, for models whose
    tower cannot be followed); a = saliency, the mean attention that a token gets from the class token
    (`attention: class`), from all patches (`received`), or 1 (`none`).

    needs  tower_features with feature tower; tower_cls or tower_received, by attention.
    gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last).
    Paper: alpha = 1, tower layer -2, 64 of LLaVA-1.5's 576 tokens, before the language model.
    Cost: one V x V Gram matrix, then V x V work per pick at most, on a CPU a few rows of it (see `Coverage`).
    Unlike the official code: batched, padding-safe; attention is the mean over heads, there the sum, which picks the
    same; the budget of an image is spent over all its tiles, there an equal part in each (wrap it in `quota` for that).
    """

    name = "scope"
    paper = "2510.24214"
    group = "duplication and diversity"
    paper_plan = """
    # SCOPE: 64 of LLaVA-1.5's 576 tokens, salient and covering the rest, before the language model.
    stages:
      - {pruner: scope, keep_tokens: 64}  # alpha = 1
    positions: compact
    """
    test_arguments = (
        {"feature": "tokens", "attention": "received"},
        {"feature": "tokens", "attention": "none"},
        {"alpha": 0.5},
    )

    def __init__(self, alpha: float = 1.0, feature: str = "tower", attention: str = "class") -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"scope needs alpha of at least 0, got {alpha}; 0 ignores saliency.")
        if feature not in FEATURES:
            raise ValueError(f"scope has no feature '{feature}'; choose one of {', '.join(FEATURES)}.")
        if attention != "none":
            check_source("scope", attention)
        self.alpha, self.feature, self.attention = alpha, feature, attention

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_features"} if self.feature == "tower" else ()) | (
            {SOURCES[self.attention]} if self.attention in SOURCES else set()
        )

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        x_BVD = tokens.vision_BVD
        if self.feature == "tower":
            assert tokens.tower_features_BLVD is not None
            x_BVD = tokens.tower_features_BLVD[:, 0]
        weight_BV = None if self.attention == "none" else saliency(tokens, self.attention) ** self.alpha
        order_BV = salient_cover(cosines(x_BVD), weight_BV, tokens.valid_BV, int(num_keep_B.max()))
        return first_picks(order_BV, tokens.valid_BV, num_keep_B)


def salient_cover(similar_BVV: Tensor, weight_BV: Tensor | None, valid_BV: Tensor, num_picks: int) -> Tensor:
    """Order of the greedy picks by coverage gain times the candidate's weight.

    Args:
        similar_BVV: symmetric similarity, fp32 (B, V, V).
        weight_BV: weight of a candidate, at least 0 (B, V); None weighs all alike.
        valid_BV: bool (B, V); padding neither covers nor counts as uncovered.
        num_picks: how many picks to make.

    Returns:
        int64 (B, V): 0 for the first pick, ...; V for tokens never picked. Ties: the earlier token.
    """
    return greedy(Coverage(similar_BVV, valid_BV.float(), weight_BV), valid_BV, num_picks)
