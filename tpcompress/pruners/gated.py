"""Base class of pruners that learn through gates, in three steps between which combinators can act.

B rows, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.gate_components import Choice, Scores

GAP = 1e-5
"""Least distance of two scores that `reordered` returns: no ties, and nothing to a temperature."""


class GatedPruner(Pruner):
    """forward = apply(choose(score)): scores with a gradient, a choice with gates, and what gates do to the tokens.

    A combinator changes the scores of its part between the first two steps (`mmr`, `window`, `quota`, `mix`) or the
    tokens between the last two (`merged`, `restore`), so that the part trains on what the combinator retains.
    """

    def score(self, tokens: TokenView, num_keep_B: Tensor) -> Scores:
        """fp32 scores, standardised per row or of that order of size; their order is the pruner's ranking."""
        raise NotImplementedError(f"{type(self).__name__} must define score(tokens, num_keep_B) -> Scores.")

    def choose(self, tokens: TokenView, scores: Scores, num_keep_B: Tensor) -> Choice:
        """The retained tokens by these scores, with gates where they train."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(tokens, scores, num_keep_B) -> Choice.")

    def apply_gates(self, tokens: TokenView, choice: Choice) -> Selection:
        """The choice as a selection, with what its gates do to the tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define apply_gates(tokens, choice) -> Selection.")

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        choice = self.choose(tokens, self.score(tokens, num_keep_B), num_keep_B)
        return self.apply_gates(tokens, choice)


def reordered(scores_BV: Tensor, place_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """Scores in another order: the token of place j has the j-th best score as its value, and its own gradient.

    So gates spread over the new order as they did over the old one, at any temperature, and the k best are exactly the
    first k places.

    Args:
        scores_BV: fp32 scores.
        place_BV: int64, the new place of each token, all different; 0 = best, padding last.
        valid_BV: bool (B, V).

    Returns:
        fp32 (B, V); scores that were equal are `GAP` apart, and all others that much further.
    """
    low = torch.finfo(torch.float32).min
    sorted_BV = scores_BV.detach().float().masked_fill(~valid_BV, low).sort(dim=1, descending=True).values
    gap_V = GAP * torch.arange(scores_BV.shape[1], device=scores_BV.device)
    value_BV = (sorted_BV - gap_V).gather(1, place_BV).masked_fill(~valid_BV, 0.0)
    return value_BV + (scores_BV - scores_BV.detach())


def merge_weights(choice: Choice, soft: bool, full_length: bool) -> Tensor | None:
    """How much each token counts in the mean that it joins: 1, with the gradient of its gate.

    Args:
        choice: with gates, or without.
        soft: the view keeps the full length.
        full_length: the gates act at full length, where they carry the gradient themselves.
    """
    if choice.gate_BV is None or (soft and full_length):
        return None
    return torch.ones_like(choice.gate_BV) + (choice.gate_BV - choice.gate_BV.detach())
