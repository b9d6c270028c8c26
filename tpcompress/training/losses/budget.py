"""Penalty on the distance between the mean gate and the keep ratio, for selectors without an exact count.

R rows, V vision tokens.
"""

from __future__ import annotations

from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp, pruned_stages, stage_sum
from tpcompress.training.passes import Pass

BELOW = ("quadratic", "linear", "zero")


def budget_gap(mean_R: Tensor, ratio_R: Tensor, below: str = "quadratic", floor: float = 0.0) -> Tensor:
    """Penalty (R,) on mean gates: (mean - ratio)^2 above the ratio, and the form named by `below` under it.

    Args:
        mean_R: mean gate of each row.
        ratio_R: keep ratio of each row.
        below: `quadratic` (mean - ratio)^2, `linear` ratio - mean, or `zero`.
        floor: means under it add (floor - mean)^2, against gates that all close (as in arXiv 2111.15668).
    """
    gap_R = mean_R.float() - ratio_R
    penalty_R = gap_R.clamp(min=0).square()
    if below == "quadratic":
        penalty_R = gap_R.square()
    elif below == "linear":
        penalty_R = penalty_R + (-gap_R).clamp(min=0)
    return penalty_R + (floor - mean_R.float()).clamp(min=0).square() if floor else penalty_R


class OnBudget(Loss):
    """Distance of the mean gate from the keep ratio, mean over rows, summed over stages.

    Source: DynamicViT (arXiv 2106.02034) and Dynamic-LLaVA (arXiv 2412.00876), which weight the quadratic form by 2
    and 100. Selectors with exact budgets do not need it. If a selector returns an expected count, that count is used
    instead of the sum of the gates.

    Args:
        below: penalty under the budget: `quadratic`, `linear` or `zero`.
        floor: mean gate, in [0, 1), under which a second quadratic term is added; 0 disables it.
        pooled: compare batch means instead of row means, so that images may have different counts.
        weight: factor on the term.

    Raises:
        ValueError: unknown `below`, or a floor outside [0, 1).
    """

    name = "budget"
    test_arguments = ({"floor": 0.7}, {"below": "linear"}, {"below": "zero", "pooled": True})

    def __init__(
        self, below: str = "quadratic", floor: float = 0.0, pooled: bool = False, weight: float | Ramp = 1.0
    ) -> None:
        super().__init__(weight)
        if below not in BELOW or not 0 <= floor < 1:
            raise ValueError(
                f"Loss 'budget' takes below of {', '.join(BELOW)} and floor in [0, 1), got {below!r} and {floor}."
            )
        self.below, self.floor, self.pooled = below, floor, pooled

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        terms = []
        for stage in pruned_stages(student):
            expected_R = stage.expected()
            if expected_R is None:
                continue
            tokens_R = stage.valid_RV.sum(1).clamp(min=1)
            mean_R, ratio_R = expected_R / tokens_R, stage.num_keep_R / tokens_R
            if self.pooled:
                mean_R, ratio_R = stage.row_mean(mean_R)[None], stage.row_mean(ratio_R)[None]
                terms.append(budget_gap(mean_R, ratio_R, self.below, self.floor)[0])
            else:
                terms.append(stage.row_mean(budget_gap(mean_R, ratio_R, self.below, self.floor)))
        return stage_sum(terms)
