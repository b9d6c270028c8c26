"""The file of an estimator table: which estimators, on the toy task and on a base model, beside which pruners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tpcompress.evaluation.engine.cell import Settings
from tpcompress.evaluation.engine.config import Config
from tpcompress.evaluation.engine.plans import FreePruner
from tpcompress.lab.estimators.catalogue import ESTIMATORS, Estimator, find_estimator


@dataclass(frozen=True)
class EstimatorTable(Config):
    """Keys of a file of estimators, beside those of `Config`.

    Attributes:
        estimators: names; empty takes all.
        steps: steps of the toy task after which the scorer is tested; training ends with the last.
        seeds: seeds of the toy task.
        scorers: scorers on the base, by the name of their column.
        base_estimators: names of those that run on the base; empty takes all of `estimators`.
        base_seeds: one run per seed, estimator and scorer.
        trained_at: tokens per image in training.
        budgets: tokens per image in tests.
        free: pruners without training, for reference.
        recipe: recipe of every run on the base.

    Raises:
        ValueError: an unknown estimator, or steps that do not rise.
    """

    out: str = "runs/estimators"
    num_images: int = 256
    estimators: tuple[str, ...] = ()
    steps: tuple[int, ...] = (60, 240)
    seeds: tuple[int, ...] = (0, 1)
    scorers: dict[str, Any] = field(default_factory=dict)
    base_estimators: tuple[str, ...] = ()
    base_seeds: tuple[int, ...] = (0,)
    trained_at: int = 16
    budgets: tuple[int, ...] = (16,)
    free: tuple[FreePruner, ...] = ()
    recipe: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        _found(self.estimators), _found(self.base_estimators)
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError(f"steps are rising counts such as [60, 240], got {list(self.steps)}.")
        for pruner in self.free:
            if pruner.budgets:
                raise ValueError(f"free: {pruner.name} has budgets of its own; all pruners are tested at `budgets`.")

    @classmethod
    def parts(cls) -> dict[str, tuple[type, str | None]]:
        """The list of pruners."""
        return {"free": (FreePruner, "pruner")}

    def on_toy(self) -> list[Estimator]:
        """Estimators to measure on the toy task."""
        return _found(self.estimators) or list(ESTIMATORS.values())

    def on_base(self) -> list[Estimator]:
        """Estimators to measure on the base."""
        return _found(self.base_estimators) or self.on_toy()


def _found(names: Sequence[str]) -> list[Estimator]:
    return [find_estimator(name) for name in names]
