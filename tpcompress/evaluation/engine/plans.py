"""Plans of a comparison's rows: a recipe at another budget, its control, and what tells rows apart."""

from __future__ import annotations

from tpcompress.insertion.plan import Budget, PruningPlan, Stage


def recipe_plan(recipe: str, budget: Budget) -> PruningPlan:
    """The plan of a recipe at another budget.

    Raises:
        ValueError: the recipe has no plan, or one of several stages.
    """
    plan = PruningPlan.of(recipe)
    if len(plan.stages) != 1:
        raise ValueError(
            f"{recipe}: a comparison sets the budget of plans with one stage, this has {len(plan.stages)}."
        )
    stage = plan.stages[0]
    new = Stage(stage.pruner.config(), stage.layer, budget.keep_ratio, budget.keep_tokens)
    return PruningPlan([new], plan.positions, plan.scope)


def control_plan(plan: PruningPlan) -> PruningPlan | None:
    """The plan without training: itself, or what its learned pruner starts as; None if that is nothing."""
    stage = plan.stages[-1]
    if not stage.pruner.learned:
        return plan
    if stage.pruner.untrained_equivalent is None:
        return None
    start = Stage(stage.pruner.untrained_equivalent, stage.layer, stage.keep_ratio, stage.keep_tokens)
    return PruningPlan([start], plan.positions, plan.scope)


def budget_of(value: float) -> Budget:
    """16 is a count, 0.111 a ratio."""
    return Budget(keep_tokens=value) if isinstance(value, int) else Budget(keep_ratio=value)


def key_of(plan: PruningPlan | None) -> tuple[str | None, int, float | None]:
    """Pruner, layer and nominal budget of the last stage: what tells rows of an arm apart."""
    if plan is None:
        return None, 0, None
    stage = plan.stages[-1]
    return stage.pruner.name, stage.layer, stage.keep_ratio if stage.keep_tokens is None else stage.keep_tokens
