"""Closes gates that nobody defends: the budget then follows from the weight."""

from __future__ import annotations

from torch import Tensor

from tpcompress.training.losses.base import Loss, chosen_stages, stage_sum
from tpcompress.training.passes import Pass


class Sparsity(Loss):
    """Mean gate over tokens, then rows, summed over stages: the L1 term of learned thresholds.

    Source: LTP (arXiv 2107.00910), which weighs it by 0.01 to 0.2.
    """

    name = "sparsity"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        stages = [stage for stage in chosen_stages(here) if stage.selection.gate_BV is not None]
        return stage_sum([stage.token_mean(stage.gate_RV().abs()) for stage in stages])
