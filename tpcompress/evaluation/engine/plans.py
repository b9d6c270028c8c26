"""Plans of the cells: a pruner at a budget, a recipe at another budget, and the control of a trained row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.pruners import create


@dataclass(frozen=True)
class FreePruner:
    """A pruner that runs without training.

    Attributes:
        pruner: its name, or `{type: name, ...arguments}`.
        layer: first decoder layer that sees fewer tokens.
        budgets: budgets to run it at; default: those of the file. 0 is for a pruner that keeps nothing (vtw).
        seeds: one row per seed, for pruners that take one.
        label: name of its rows, for a pruner with several sets of arguments; default: the pruner's name.

    Raises:
        ValueError: unknown pruner, or arguments that it refuses.
    """

    pruner: Any
    layer: int = 0
    budgets: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    label: str | None = None

    def __post_init__(self) -> None:
        create(self.pruner)

    @property
    def name(self) -> str:
        """Name of its rows."""
        return self.label or str(self.pruner["type"] if isinstance(self.pruner, dict) else self.pruner)

    @property
    def selects(self) -> bool:
        """It retains tokens unchanged, as a learned gate does, and does not merge."""
        return not create(self.pruner).merges

    def plan(self, budget: Budget, seed: int | None = None) -> PruningPlan:
        """The plan of one row."""
        return one_stage(self.pruner, self.layer, budget, seed)


def one_stage(pruner: Any, layer: int, budget: Budget, seed: int | None = None) -> PruningPlan:
    """A plan of one stage.

    Args:
        pruner: name, or `{type: name, ...arguments}`.
        layer: first decoder layer that sees fewer tokens.
        budget: its budget.
        seed: argument `seed` of the pruner; None leaves it.
    """
    config = {"type": pruner} if isinstance(pruner, str) else dict(pruner)
    config |= {} if seed is None else {"seed": seed}
    return PruningPlan([Stage(config, layer, budget.keep_ratio, budget.keep_tokens)])


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
    """The plan without training: itself, or the untrained equivalent of its learned pruner; None if there is none."""
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
    """Pruner, layer and nominal budget of the last stage: what identifies a row."""
    if plan is None:
        return None, 0, None
    stage = plan.stages[-1]
    return stage.pruner.name, stage.layer, stage.keep_ratio if stage.keep_tokens is None else stage.keep_tokens
