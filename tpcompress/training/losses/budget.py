"""Keeps gates on their budget where the selector does not do so by itself.

R rows, V vision tokens.
"""

from __future__ import annotations

from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp, chosen_stages, stage_sum
from tpcompress.training.passes import Pass

BELOW = ("quadratic", "linear", "zero")


def budget_gap(mean_R: Tensor, ratio_R: Tensor, below: str = "quadratic", floor: float = 0.0) -> Tensor:
    """Penalty (R,) on mean gates: (mean - ratio)^2 above the ratio, `below` it the same, ratio - mean, or nothing.

    Args:
        mean_R: mean gate of each row.
        ratio_R: share of the tokens that the budget gives it.
        below: `quadratic`, `linear` or `zero`.
        floor: means under it cost (floor - mean)^2 more, against gates that all close (as in arXiv 2111.15668).
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

    DynamicViT (arXiv 2106.02034) and Dynamic-LLaVA (arXiv 2412.00876) weigh the quadratic form by 2 and 100. Selectors
    with exact budgets do not need it; where one says how many tokens it expects to retain, that number counts.

    Args:
        below: what being under the budget costs: `quadratic`, `linear` or `zero`.
        floor: mean gate, in [0, 1), under which a second quadratic term pulls up; 0 leaves it out.
        pooled: compare means over the batch instead of those of each row, so that images may differ.
        weight: of the term.

    Raises:
        ValueError: unknown `below`, or a floor outside [0, 1).
    """

    name = "budget"

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

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        terms = []
        for stage in chosen_stages(here):
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
