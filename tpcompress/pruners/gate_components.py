"""The three parts of a learned pruner: what scores tokens, what chooses by the scores, what carries the gradient.

B rows, V vision tokens, S sequence length, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.config_mixin import ConfigMixin
from tpcompress.pruners.views import PROMPT_VIEWS, TOWER_LAYERS


class Part(ConfigMixin):
    """What the parts have in common: a name, plain arguments, weights that are made when the width is known."""

    def build(self, hidden_size: int) -> None:
        """Create weights once the model's width is known. Most parts have none.

        Raises:
            ValueError: they were made for another width.
        """

    @property
    def learned(self) -> bool:
        """It has weights to train."""
        return False

    def set_progress(self, progress: float) -> None:
        """How far the training of the pruner is, from 0 to 1. Most parts do not care."""


@dataclass(frozen=True)
class Scores:
    """What a scorer says.

    Attributes:
        scores_BV: fp32, higher = keep; of any scale, the pruner standardises them per row.
        text_BSD: what the scorer made of the whole sequence, for a loss of its own; None if it did not look at it.
        votes_BVV: fp32, row v: how token v would vote for each token; for selectors that count votes.
    """

    scores_BV: Tensor
    text_BSD: Tensor | None = None
    votes_BVV: Tensor | None = None


class Scorer(Part):
    """`TokenView -> Scores`."""

    untrained_equivalent: ClassVar[str | None] = None
    """The training-free pruner whose order it has before training; None for one that starts without knowledge."""

    @property
    def needs(self) -> frozenset[str]:
        """Optional views it reads, see `Pruner.needs`."""
        return frozenset()

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """Layers of the vision tower that its views show, see `Pruner.tower_layers`."""
        return TOWER_LAYERS

    @property
    def prompt_dependent(self) -> bool:
        """Its scores depend on the prompt, see `Pruner.prompt_dependent`."""
        return bool(self.needs & PROMPT_VIEWS)

    def forward(self, tokens: TokenView) -> Scores:
        """Score every token; padding may get any finite number."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens) -> Scores.")


@dataclass(frozen=True)
class Choice:
    """What a selector makes of scores.

    Attributes:
        keep_BV: bool, the retained tokens.
        scores_BV: the scores it chose by.
        gate_BV: weights in [0, 1] that carry a gradient, smooth or 0/1 in the forward pass; None if it has none.
        log_prob_B: log probability of the drawn set; None if nothing was drawn.
        expected_B: expected number of retained tokens, with a gradient; None if the count is not learned.
    """

    keep_BV: Tensor
    scores_BV: Tensor
    gate_BV: Tensor | None = None
    log_prob_B: Tensor | None = None
    expected_B: Tensor | None = None


class Selector(Part):
    """Scores and a count to a `Choice`."""

    exact_count: ClassVar[bool] = True
    """It retains exactly the count."""
    votes: ClassVar[bool] = False
    """It counts votes, so its scorer must give `Scores.votes_BVV`."""
    progress: float = 0.0
    """How far the training of the pruner is, from 0 to 1; for selectors that change on the way."""

    def set_progress(self, progress: float) -> None:
        self.progress = min(max(progress, 0.0), 1.0)

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        """Choose.

        Args:
            scores: fp32; `scores_BV` is standardised per row.
            valid_BV: bool; padding is never retained.
            num_keep_B: int64 (B,) on the CPU, at most the number of valid tokens of the row.
            explore: in training: gates and noise are wanted. Without it every selector is deterministic.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(scores, valid, num_keep, explore).")


class Applier(Part):
    """A choice to a `Selection`: how the gates act on the model while it trains."""

    full_length: ClassVar[bool] = False
    """Its gates want the whole sequence (mode `mask`)."""
    merges: ClassVar[bool] = False
    """Retained tokens absorb dropped ones, in inference as well."""
    trains_through_model: ClassVar[bool] = True
    """What the model says in training depends on the gates."""
    gates: ClassVar[bool] = False
    """It acts inside the attention of the layers behind the stage."""

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        """Apply the gates; without any, pass the choice on."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens, choice) -> Selection.")
