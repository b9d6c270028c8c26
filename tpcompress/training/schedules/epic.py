"""EPIC's curricula (arXiv 2510.00515): random ratios from a growing window, and a stage that moves to shallow layers.

Default values are those of its training script for LLaVA-1.5; p is the progress.
"""

from __future__ import annotations

from tpcompress.insertion.plan import Budget
from tpcompress.training.schedules.base import Schedule


class EpicWindow(Schedule):
    """Token-consistency curriculum: the dropped share is drawn from U(r_min(p), r_max(p)), both growing.

        r_min = first + span p low,    r_max = first + span p high

    Source: EPIC (arXiv 2510.00515). As published, the window ends at U(0.26, 0.74) for every plan, so a keep ratio of
    1/9 is never trained. `reach` replaces `span` such that r_max ends at the dropped share of the plan.

    Args:
        first: dropped share at the start.
        span: distance that the window moves.
        low: share of the span by which the lower bound moves.
        high: share of the span by which the upper bound moves.
        reach: end at the plan's budget, which must be a keep_ratio.

    Raises:
        ValueError: bounds outside [0, 1), or `reach` with a plan of keep_tokens.
    """

    def __init__(
        self, first: float = 0.1, span: float = 0.8, low: float = 0.2, high: float = 0.8, reach: bool = False
    ) -> None:
        if not (0 <= first < 1 and span > 0 and 0 <= low <= high and high > 0 and first + span * high < 1):
            raise ValueError(
                f"EpicWindow needs 0 <= first < 1, span > 0, 0 <= low <= high and first + span high < 1, got "
                f"{first}, {span}, {low}, {high}."
            )
        self.first, self.span, self.low, self.high, self.reach = first, span, low, high, reach

    def budget(self, final: Budget, progress: float, draw: float) -> Budget:
        if final.keep_tokens == 0:  # 0 tokens, which the last stage of a plan may keep, remain 0
            return final
        span = self.span
        if self.reach:
            if final.keep_ratio is None:
                raise ValueError("EpicWindow with reach needs a plan with keep_ratio, not keep_tokens.")
            span = max(0.0, 1 - final.keep_ratio - self.first) / self.high
        least, most = (self.first + span * progress * end for end in (self.low, self.high))
        return Budget(keep_ratio=1 - (least + draw * (most - least)))


class LayerRamp(Schedule):
    """Layer-consistency curriculum: the stage moves from deep to shallow, l = round(L - p (L - l_plan)).

    Source: EPIC (arXiv 2510.00515). L is the depth of the model. The first steps, whose l is L, prune before the last
    layer. Several stages keep their order.

    Args:
        until: share of the phase at which the plan's layer is reached.
        budget: schedule of the budget; null for the plan's.

    Raises:
        ValueError: `until` outside (0, 1], or a `budget` that moves layers as well.
    """

    moves = True

    def __init__(self, until: float = 1.0, budget: Schedule | None = None) -> None:
        if not 0 < until <= 1:
            raise ValueError(f"LayerRamp needs until in (0, 1], got {until}.")
        if budget is not None and budget.moves:
            raise ValueError("LayerRamp.budget must be a schedule of budgets, got one that moves layers.")
        self.until, self.inner = until, budget

    def budgets(self, final: Budget, progress: float, draw: float) -> list[Budget]:
        return [final] if self.inner is None else self.inner.budgets(final, progress, draw)

    def layer(self, final: int, depth: int, progress: float) -> int:
        return min(depth - 1, round(depth - min(1.0, progress / self.until) * (depth - final)))
