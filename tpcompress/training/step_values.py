"""Budgets and layers of the stages in one training step, by the schedule of its phase."""

from __future__ import annotations

from tpcompress.insertion.budget import Budget
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.schedules import Schedule


def step_budgets(
    plan: PruningPlan | None, schedule: Schedule, progress: float, draw: float
) -> list[list[Budget] | None]:
    """Budgets of the stages in each forward call of a step; [None] without a plan."""
    if plan is None:
        return [None]
    each = [schedule.budgets(stage.budget, progress, draw) for stage in plan.stages]
    return [list(values) for values in zip(*each, strict=True)]


def step_layers(plan: PruningPlan, schedule: Schedule, num_layers: int, progress: float) -> list[int]:
    """Layers of the stages at a step: strictly rising, and below `num_layers`."""
    found = [schedule.layer(stage.layer, num_layers, progress) for stage in plan.stages]
    for number in range(len(found) - 2, -1, -1):
        found[number] = min(found[number], found[number + 1] - 1)
    return found
