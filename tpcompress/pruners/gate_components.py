"""Base classes of the three components of a learned gate (scorer, selector, applier) and what they exchange.

B rows, V vision tokens, S sequence length, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.config_mixin import ConfigMixin
from tpcompress.pruners.views import ViewReader


class Part(ConfigMixin):
    """Base class of the components: a name, plain arguments, and weights created for a hidden size."""

    def build(self, hidden_size: int) -> None:
        """Create weights for a hidden size; components without weights do nothing.

        Raises:
            ValueError: weights exist already for another hidden size.
        """

    @property
    def learned(self) -> bool:
        """True if the component has weights to train."""
        return False

    def set_progress(self, progress: float) -> None:
        """Set the progress of training, from 0 to 1; ignored by components without annealed settings."""


@dataclass(frozen=True)
class Scores:
    """Output of a scorer.

    Attributes:
        scores_BV: fp32, higher = keep, of any scale: the learned gate standardises them per row.
        text_BSD: the scorer's output over the whole sequence, for a loss of its own; None if it reads vision tokens
            only.
        votes_BVV: fp32; row v holds the votes of token v for every token, for selectors that count votes.
    """

    scores_BV: Tensor
    text_BSD: Tensor | None = None
    votes_BVV: Tensor | None = None


class Scorer(ViewReader, Part):
    """`TokenView -> Scores`."""

    untrained_equivalent: ClassVar[str | None] = None
    """The training-free pruner whose ranking it has before training; None if its initial ranking is arbitrary."""

    def forward(self, tokens: TokenView) -> Scores:
        """Score every token; scores of padding are arbitrary but finite."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens) -> Scores.")


@dataclass(frozen=True)
class Choice:
    """Output of a selector.

    Attributes:
        keep_BV: bool, the retained tokens.
        scores_BV: the scores that the selection is based on.
        gate_BV: weights in [0, 1] that carry a gradient, smooth or 0/1 in the forward pass; None if it has none.
        log_prob_B: log probability of the sampled set; None without sampling.
        expected_B: expected number of retained tokens, with a gradient; None if the count is not learned.
        text_BSD: `Scores.text_BSD`, handed on.
    """

    keep_BV: Tensor
    scores_BV: Tensor
    gate_BV: Tensor | None = None
    log_prob_B: Tensor | None = None
    expected_B: Tensor | None = None
    text_BSD: Tensor | None = None


class Selector(Part):
    """Base class of selectors: scores and a count -> `Choice`."""

    exact_count: ClassVar[bool] = True
    """If False, it chooses its own count."""
    votes: ClassVar[bool] = False
    """It counts votes, so the scorer must return `Scores.votes_BVV`."""
    progress: float = 0.0
    """Progress of training, from 0 to 1."""

    def set_progress(self, progress: float) -> None:
        self.progress = min(max(progress, 0.0), 1.0)

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        """Select tokens by score.

        Args:
            scores: fp32; `scores_BV` is standardised per row.
            valid_BV: bool; padding is never retained.
            num_keep_B: int64 (B,) on the CPU, at most the number of valid tokens of the row.
            explore: in training, return gates and apply noise; otherwise every selector is deterministic.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(scores, valid, num_keep, explore).")


class Applier(Part):
    """Base class of appliers: `Choice` -> `Selection`; defines how gates act on the model in training."""

    full_length: ClassVar[bool] = False
    """Its gates require the uncut sequence (mode `mask`)."""
    merges: ClassVar[bool] = False
    """Retained tokens absorb dropped ones, in inference as well."""
    trains_through_model: ClassVar[bool] = True
    """If False, the model's output does not depend on the gates in training."""
    gates: ClassVar[bool] = False
    """It acts inside the attention of later layers."""

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        """Apply the gates; without gates, return the choice unchanged."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens, choice) -> Selection.")
