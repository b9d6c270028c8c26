"""Base class of pruners and their output: a pruner is a pure function of tensors, `TokenView -> Selection`.

B rows (one per image, or one per prompt under `scope: prompt`), V vision tokens (padded), D hidden size,
S sequence length, H attention heads, Q words of the prompt (padded), L layers of the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tpcompress.pruners.config_mixin import ConfigMixin
from tpcompress.pruners.views import BETWEEN, INSTRUCTION, SYSTEM, TOWER_LAYERS, TokenView, ViewReader

__all__ = ["BETWEEN", "INSTRUCTION", "SYSTEM", "TOWER_LAYERS", "Pruner", "Selection", "TokenView"]


@dataclass(frozen=True)
class Selection:
    """Output of a pruner; the sequence itself is shortened by `tpcompress/insertion`.

    Attributes:
        keep_BV: bool, the retained tokens: exactly `num_keep` per row if the pruner has `exact_count`.
        scores_BV: higher = keep; for plots, losses and tie-breaking.
        gate_BV: weights in [0, 1] that carry a gradient, smooth or 0/1 in the forward pass (training only). With
            `TokenView.soft` the sequence is not cut then.
        vision_BVD: new values of the vision tokens (merging pruners; noise gate); None leaves them as they are.
        size_BV: number of tokens that each retained one represents, fp32; later layers weight its key by it
            (proportional attention). None weights all keys equally.
        place_BV: int64, the token whose position each retained one takes; None leaves each at its own.
        value_gate_BV: factor on the attention values of the tokens in every later layer (training only); None is 1.
        key_bias_BV: added to the attention logits of their keys there, fp32 (training only); None is 0.
        log_prob_B: log probability of the sampled set, for score-function losses; None without sampling.
        expected_B: expected number of retained tokens, with a gradient; None if the count is not learned.
        text_BSD: the scorer's output over the whole sequence, for a loss of its own.
    """

    keep_BV: Tensor
    scores_BV: Tensor
    gate_BV: Tensor | None = None
    vision_BVD: Tensor | None = None
    size_BV: Tensor | None = None
    place_BV: Tensor | None = None
    value_gate_BV: Tensor | None = None
    key_bias_BV: Tensor | None = None
    log_prob_B: Tensor | None = None
    expected_B: Tensor | None = None
    text_BSD: Tensor | None = None


class Pruner(ViewReader, ConfigMixin):
    """Base class of pruners: a pruner chooses which vision tokens are retained.

    Subclasses set `name` (the key in plans, YAML, tables and checkpoints), take plain values in `__init__` and store
    them under their own names, so that `config` works without further code; `create` is its inverse. The other class
    attributes describe the pruner; those that depend on arguments are set in `__init__`.
    """

    paper: ClassVar[str] = "ours"
    """arXiv number of the method's paper, or `ours`."""
    group: ClassVar[str] = "other"
    """Heading under which lists of pruners show it, such as `duplication and diversity`."""
    paper_plan: ClassVar[str] = ""
    """YAML of a plan with the settings of its paper; `NAME:paper` is this plan wherever a plan is read."""
    more_plans: ClassVar[Mapping[str, str]] = {}
    """Further such plans by name."""
    inexact_arguments: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Arguments worth testing with which the pruner does not retain exactly its budget."""
    merges: bool = False
    """Retained tokens absorb dropped ones: the selection contains new values of the vision tokens."""
    exact_count: bool = True
    """If False, the pruner chooses its own count; reading it costs one host-device sync per prefill."""
    differentiable: bool = False
    """True if a gradient reaches the scores."""
    uses_token_sizes: bool = False
    """The selection contains sizes or positions of retained tokens, which layers after the stage must apply."""
    trainable_when_cut: bool = False
    """True if weights receive a gradient when the sequence is cut; otherwise they train at full length only."""
    trains_through_model: bool = True
    """True if the model's output depends on the pruner's weights during training. If False, add a loss on the selection
    (e.g. `Imitate`)."""
    gates: bool = False
    """In training, the selection may act inside the attention of later layers: by value gates or key biases."""
    keeps_none: ClassVar[bool] = False
    """Retains no token: the budget of its stage is 0, which no other pruner accepts."""
    untrained_equivalent: str | dict[str, Any] | None = None
    """The training-free pruner, by name or config, that a learned one equals before training: its control in
    comparisons."""

    @property
    def learned(self) -> bool:
        """True if the pruner has weights to train."""
        return False

    def build(self, hidden_size: int) -> None:
        """Create weights for a hidden size; pruners without weights do nothing."""

    def set_progress(self, progress: float) -> None:
        """Set the progress of training, from 0 to 1, for pruners with annealed settings; ignored by others."""

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        """Select the tokens to retain.

        Args:
            tokens: features and the views in `needs`.
            num_keep_B: int64 (B,) on the CPU: number of tokens that each row retains, at most its number of
                valid tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens, num_keep_B) -> Selection.")
