"""Budgets of an export: other ones than the plan's, the range it was trained at, and accuracy over budgets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpcompress.insertion.budget import Budget
from tpcompress.insertion.plan import PruningPlan

Range = tuple[Budget, Budget]
"""The lowest and the highest budget that a stage was trained at."""


@dataclass(frozen=True)
class CurvePoint:
    """What an export is worth at one budget.

    Attributes:
        budget: in words, one per stage.
        retained: vision tokens behind the last stage, mean over prompts.
        accuracy: share in [0, 1]: mean over the question families of `data`.
        ci95: half width of its 95 % interval, by resampling pictures.
        token_accuracy: share of answer tokens that are right, given those before.
        loss: mean label loss of an answer token, nats.
        questions, images: how many were asked, and about how many pictures.
        data: what was asked.
        seed: of the pictures and of the interval.
        trained: whether the budget lies in the range of training; None where nothing trained.
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
    """The plan's."""
    return [stage.budget for stage in plan.stages]


def words(budgets: Sequence[Budget]) -> str:
    """Budgets as a person reads them, stage by stage."""
    return ", then ".join(str(budget) for budget in budgets)


def as_dict(budget: Budget) -> dict[str, Any]:
    """The field of a budget that is set."""
    return {name: value for name, value in vars(budget).items() if value is not None}


def describe_ranges(ranges: Sequence[Range] | None, total: int) -> list[dict[str, Any]] | None:
    """What a manifest says of the budgets of training, for a row of `total` vision tokens."""
    if ranges is None:
        return None
    return [
        {"low": as_dict(low), "high": as_dict(high), "retained": [low.count(total), high.count(total)]}
        for low, high in ranges
    ]


def ranges_of(manifest: dict[str, Any]) -> list[Range] | None:
    """The inverse of `describe_ranges`; None of an export that does not say."""
    found = manifest.get("trained_budgets")
    return None if found is None else [(Budget(**each["low"]), Budget(**each["high"])) for each in found]


def was_trained(budgets: Sequence[Budget], ranges: Sequence[Range], total: int) -> bool:
    """Whether every stage keeps a count of `total` tokens that lies in its range of training."""
    pairs = zip(budgets, ranges, strict=True)
    return all(low.count(total) <= budget.count(total) <= high.count(total) for budget, (low, high) in pairs)


def probed_budgets(plan: PruningPlan, ranges: Sequence[Range] | None, total: int) -> list[list[Budget]]:
    """The ends of the range of training, where they keep other counts than the plan: what a probe holds as well."""
    if ranges is None:
        return []
    if len(ranges) != len(plan.stages):
        raise ValueError(f"The plan has {len(plan.stages)} stages, got {len(ranges)} ranges of budgets; give one each.")
    seen, found = [[b.count(total) for b in own_budgets(plan)]], []
    for end in ([low for low, _ in ranges], [high for _, high in ranges]):
        counts = [b.count(total) for b in end]
        if counts not in seen:
            seen.append(counts)
            found.append(end)
    return found
