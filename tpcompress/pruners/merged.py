"""Merged: any pruner, with what it drops merged into what it retains (ours)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpcompress.pruners.base import TOWER_LAYERS, Pruner, Selection, TokenView
from tpcompress.pruners.combinators import Composed
from tpcompress.pruners.merging import METRICS, check_metric, group_sizes, merge_groups, metric_of, nearest_kept

WEIGHTS = ("mean", "similarity")


class Merged(Composed):
    """S = what `pruner` retains; each v outside S joins g(v) = argmax_{s in S} cos(m_s, m_v);

    x_s = sum of w_v x_v / sum of w_v over s and all that joined it. `weights: mean` has w = 1, `weights: similarity`
    has w_s = 1 and w_v = max(0, cos(m_s, m_v)). `metric` is what tokens are compared by: themselves, or the mean over
    heads of their keys in the vision tower. With `proportional`, layers after the stage add the log of each group's
    size to the logits of its key.

    A `pruner` that learns trains through it: where its gates act at full length they act on the merged values, and
    sizes weigh keys there as well; where the sequence is cut, gates weigh the members of a group (w_v = 1 + m_v -
    sg(m_v), as with the applier `merge`), so that even the applier `gather` trains.

    needs  what `pruner` needs, and tower_keys with keys.     gives  keep_BV, scores_BV of `pruner`; vision_BVD;
    size_BV with `proportional`.
    Cost: that of `pruner`, one product of retained with all tokens, and one to average.
    """

    name = "merged"
    merges = True
    only_rank = True
    group = "merging"
    paper_plan = """
    # DivPrune's 64 of LLaVA-1.5's 576 tokens, each with the mean of the dropped ones most similar to it.
    stages:
      - {pruner: merged, layer: 0, keep_tokens: 64}
    """
    test_arguments = (
        {"weights": "similarity", "proportional": True},
        {"metric": "keys", "pruner": {"type": "random", "seed": 3, "resample": False}},
        {"pruner": {"type": "learned_gate"}, "proportional": True},
        {"pruner": {"type": "learned_gate", "applier": "gather"}, "weights": "similarity", "proportional": True},
    )

    def __init__(
        self,
        pruner: Pruner | str | dict[str, Any] = "divprune",
        metric: str = "features",
        weights: str = "mean",
        proportional: bool = False,
    ) -> None:
        super().__init__(pruner=pruner)
        check_metric(self.name, metric)
        if weights not in WEIGHTS:
            raise ValueError(f"merged has no weights '{weights}'; choose one of {', '.join(WEIGHTS)}.")
        self.metric, self.weights, self.proportional = metric, weights, proportional
        self.differentiable, self.uses_token_sizes = self.parts[0].differentiable, proportional
        self.adopt()
        self.trains_through_model = True

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | METRICS[self.metric]

    @property
    def tower_layers(self) -> tuple[int, ...]:
        layers = super().tower_layers
        return tuple(dict.fromkeys((*layers, *TOWER_LAYERS))) if self.metric == "keys" else layers

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        choice, most = self.chosen(tokens, num_keep_B), int(num_keep_B.max())
        layer = self.tower_layers.index(TOWER_LAYERS[0]) if self.metric == "keys" else 0
        metric_BVD = metric_of(tokens, self.metric, layer)
        group_BV, similar_BV = nearest_kept(metric_BVD, choice.keep_BV, tokens.valid_BV, most)
        weight_BV = self.member_weights(tokens, choice)
        if self.weights == "similarity":
            weight_BV = similar_BV.clamp(min=0) * (1 if weight_BV is None else weight_BV)
        vision_BVD = merge_groups(tokens.vision_BVD, group_BV, choice.keep_BV, most, weight_BV)
        size_BV = group_sizes(group_BV).clamp(min=1).float() if self.proportional else None
        return self.with_values(tokens, choice, vision_BVD, size_BV=size_BV)
