"""Learned gate: a small scorer trained with the model's own loss through gates that a gradient passes.

Ours; a frame for most learned rules of the literature, which differ in its three parts:
    s    = standardise(scorer(x))                     what gives a token its score
    keep, m = selector(s, k)                          hard top-k; in training also weights m with sum(m) = k
    x'   = applier(x, m)                              how m acts on the model while the scorer learns
By default the scorer sees a token, its 3 x 3 neighbours and its image, m is the exact soft top-k, and a token with m
near 0 carries noise of the right size instead of information. Inference keeps the hard top-k of the scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice, Part, Scorer, Scores, Selector
from tpcompress.pruners.gated import GatedPruner
from tpcompress.pruners.registry import KINDS, create_part
from tpcompress.pruners.topk import central, grid_cells, standardise


class LearnedGate(GatedPruner):
    """keep = selector(standardise(scorer(x)), k), learned through an applier.

    Scorers, selectors and appliers are names, or mappings with `type` and arguments; `tpcompress pruners` lists them.
    With a scorer that does not read the prompt, images can be pruned before a prompt arrives. One that reads it
    performs part of the visual search, so that its tokens do not serve another question. `reserve` tokens on a fixed
    grid are always kept (for use without fine-tuning the backbone).

    needs  what its scorer needs.     gives  keep_BV, scores_BV, and in training what selector and applier add.
    Cost: that of its parts, and one sort of V.
    """

    name = "learned_gate"
    differentiable = True
    group = "learned"
    test_arguments = (
        {"scorer": {"type": "local_global", "question": True}},
        {"reserve": 3},
        {"scorer": {"type": "local_global", "question": True, "width": 8}, "reserve": 4},
        {"scorer": "cross_attention", "selector": "straight_through", "applier": "value"},
        {"selector": "straight_through", "applier": "log_bias"},
        {"scorer": "mean_key", "selector": {"type": "soft_topk", "relaxation": "laplace"}, "applier": "merge"},
        {"scorer": "mlp", "selector": "soft_topk", "applier": "scale"},
        {"scorer": "linear", "selector": "straight_through", "applier": "rest"},
    )
    inexact_arguments = (
        {"selector": "threshold", "applier": "value"},
        {"selector": "learned_budget", "applier": "gather_value"},
        {"scorer": {"type": "cross_attention", "union": True}, "selector": "argmax_union", "applier": "gather_value"},
    )

    def __init__(
        self,
        scorer: Any = "local_global",
        selector: Any = "soft_topk",
        applier: Any = "noise",
        reserve: int = 0,
    ) -> None:
        super().__init__()
        if reserve < 0:
            raise ValueError(f"learned_gate needs reserve >= 0, got {reserve}.")
        # Components from outside the package are mappings or modules here, which `create` has checked.
        self.scorer: Scorer = create_part("scorer", scorer, allow_outside=False)
        self.selector: Selector = create_part("selector", selector, allow_outside=False)
        self.applier: Applier = create_part("applier", applier, allow_outside=False)
        self.reserve = reserve
        self.untrained_equivalent = None if reserve else self.scorer.untrained_equivalent
        self.exact_count, self.merges = self.selector.exact_count, self.applier.merges
        self.trainable_when_cut = not self.applier.full_length
        self.trains_through_model, self.gates = self.applier.trains_through_model, self.applier.gates
        if reserve and self.selector.votes:
            raise ValueError(f"Selector '{self.selector.name}' counts votes and supports no reserve; set reserve: 0.")
        if self.applier.merges and not self.selector.exact_count:
            raise ValueError(
                f"Applier '{self.applier.name}' merges, so every row needs its exact count; selector "
                f"'{self.selector.name}' chooses its own count. Take applier value, noise or log_bias."
            )

    @property
    def chain(self) -> tuple[Part, ...]:
        """Scorer, selector and applier."""
        return (self.scorer, self.selector, self.applier)

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return self.scorer.tower_layers

    @property
    def prompt_dependent(self) -> bool:
        return self.scorer.prompt_dependent

    @property
    def learned(self) -> bool:
        return any(part.learned for part in self.chain)

    def build(self, hidden_size: int) -> None:
        for part in self.chain:
            part.build(hidden_size)

    def set_progress(self, progress: float) -> None:
        for part in self.chain:
            part.set_progress(progress)

    def config(self) -> dict[str, Any]:
        parts = dict(zip(KINDS, self.chain, strict=True))
        return super().config() | {kind: part.config() for kind, part in parts.items()}

    def score(self, tokens: TokenView, num_keep_B: Tensor) -> Scores:
        said: Scores = self.scorer(tokens)
        scores_BV = standardise(said.scores_BV, tokens.valid_BV)
        if self.reserve:
            scores_BV = self._with_reserve(scores_BV, tokens, num_keep_B)
        return replace(said, scores_BV=scores_BV)

    def choose(self, tokens: TokenView, scores: Scores, num_keep_B: Tensor) -> Choice:
        explore = self.training and (tokens.soft or not self.applier.full_length)
        choice: Choice = self.selector(scores, tokens.valid_BV, num_keep_B, explore)
        return replace(choice, text_BSD=scores.text_BSD)

    def apply_gates(self, tokens: TokenView, choice: Choice) -> Selection:
        chosen: Selection = self.applier(tokens, choice)
        return replace(chosen, log_prob_B=choice.log_prob_B, expected_B=choice.expected_B, text_BSD=choice.text_BSD)

    def _with_reserve(self, scores_BV: Tensor, tokens: TokenView, num_keep_B: Tensor) -> Tensor:
        """Scores in which the central tokens of a coarse grid stand above all others."""
        slots_B = num_keep_B.clamp(max=self.reserve)
        cell_BV = grid_cells(tokens.row_BV, tokens.col_BV, tokens.valid_BV, slots_B)
        reserved_BV = central(cell_BV, tokens.row_BV, tokens.col_BV, tokens.valid_BV)
        # Above all others by more than any temperature: a standardised score alone may reach the root of V.
        above_B1 = scores_BV.detach().masked_fill(~tokens.valid_BV, -torch.inf).amax(1, keepdim=True) + 20
        return torch.where(reserved_BV, above_B1, scores_BV)
