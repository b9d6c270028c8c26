"""L1 penalty on the mean gate. The resulting budget depends on the weight of the loss."""

from __future__ import annotations

from torch import Tensor

from tpcompress.training.losses.base import Loss, pruned_stages, stage_sum
from tpcompress.training.passes import Pass


class Sparsity(Loss):
    """Mean gate over tokens, then rows, summed over stages: the L1 term of learned thresholds.

    Source: LTP (arXiv 2107.00910), with weights from 0.01 to 0.2.
    """

    name = "sparsity"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        stages = [stage for stage in pruned_stages(student) if stage.selection.gate_BV is not None]
        return stage_sum([stage.token_mean(stage.gate_RV().abs()) for stage in stages])
