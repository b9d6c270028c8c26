"""Budgets of an export: other budgets than the plan's, the trained range, and accuracy at each budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpcompress.errors import counted
from tpcompress.insertion.budget import Budget
from tpcompress.insertion.plan import PruningPlan

Range = tuple[Budget, Budget]
"""Lowest and highest budget that a stage was trained at."""


@dataclass(frozen=True)
class CurvePoint:
    """Measured accuracy of an export at one budget.

    Attributes:
        budget: budgets of the stages as text.
        retained: vision tokens after the last stage, mean over prompts.
        accuracy: mean over the question families of `data`, in [0, 1].
        ci95: half width of the 95 % interval of `accuracy`, by bootstrap over images.
        token_accuracy: share of correct answer tokens under teacher forcing.
        loss: mean label loss per answer token, in nats.
        questions: number of questions.
        images: number of images.
        data: description of the data.
        seed: seed of the images and of the bootstrap.
        trained: whether the budget lies in the trained range; None without training.
    """

    budget: str
    retained: float
    accuracy: float
    ci95: float
    token_accuracy: float
    loss: float
    questions: int
    images: int
    data: str
    seed: int
    trained: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def with_budgets(plan: PruningPlan, budgets: Sequence[Budget] | None) -> PruningPlan:
    """The plan with other budgets (None keeps its own), checked to be writable as JSON.

    Raises:
        ValueError: not one budget per stage, budgets that grow or that a pruner does not accept, or arguments of a
            pruner that JSON cannot hold.
    """
    plan = plan if budgets is None else plan.with_budgets(budgets)
    try:
        json.dumps(plan.to_dict())
    except TypeError as error:
        raise ValueError(f"The plan cannot be written ({error}); pruners take plain values only.") from error
    return plan


def own_budgets(plan: PruningPlan) -> list[Budget]:
    """Budgets of the plan, one per stage."""
    return [stage.budget for stage in plan.stages]


def words(budgets: Sequence[Budget]) -> str:
    """Budgets of all stages as text."""
    return ", then ".join(str(budget) for budget in budgets)


def as_dict(budget: Budget) -> dict[str, Any]:
    """The field of a budget that is set, as a mapping."""
    return {name: value for name, value in vars(budget).items() if value is not None}


def describe_ranges(ranges: Sequence[Range] | None, total: int) -> list[dict[str, Any]] | None:
    """Trained ranges as plain values for the manifest, for a row of `total` vision tokens."""
    if ranges is None:
        return None
    return [
        {"low": as_dict(low), "high": as_dict(high), "retained": [low.count(total), high.count(total)]}
        for low, high in ranges
    ]


def ranges_of(manifest: dict[str, Any]) -> list[Range] | None:
    """Read the trained ranges of a manifest; None without any."""
    found = manifest.get("trained_budgets")
    return None if found is None else [(Budget(**each["low"]), Budget(**each["high"])) for each in found]


def was_trained(budgets: Sequence[Budget], ranges: Sequence[Range], total: int) -> bool:
    """Whether the count of every stage, of `total` tokens, lies in its trained range."""
    pairs = zip(budgets, ranges, strict=True)
    return all(low.count(total) <= budget.count(total) <= high.count(total) for budget, (low, high) in pairs)


def probed_budgets(plan: PruningPlan, ranges: Sequence[Range] | None, total: int) -> list[list[Budget]]:
    """Ends of the trained range whose counts differ from the plan's; a probe records them too.

    Raises:
        ValueError: not one range per stage.
    """
    if ranges is None:
        return []
    if len(ranges) != len(plan.stages):
        raise ValueError(
            f"The plan has {counted(len(plan.stages), 'stage')}, got {counted(len(ranges), 'range')} of budgets; "
            f"give one each."
        )
    seen, found = [[b.count(total) for b in own_budgets(plan)]], []
    for end in ([low for low, _ in ranges], [high for _, high in ranges]):
        counts = [b.count(total) for b in end]
        if counts not in seen:
            seen.append(counts)
            found.append(end)
    return found
