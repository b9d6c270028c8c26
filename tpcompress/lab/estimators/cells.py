"""What a file of estimators says, and the cells of its two tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tpcompress.evaluation.engine.config import keys_of, read_settings
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.lab.estimators.catalogue import ESTIMATORS, Estimator, find_estimator
from tpcompress.lab.study.cells import Training, merged
from tpcompress.pruners import create

Settings = dict[str, Any]


@dataclass(frozen=True)
class FreeRule:
    """A pruner without training, as a reference.

    Attributes:
        pruner: its name, or `{type: name, ...arguments}`.
        label: what stands in the table; default: the pruner's name.
        layer: first decoder layer that sees fewer tokens.
        seeds: one row per seed, for pruners that take one.
    """

    pruner: Any
    label: str = ""
    layer: int = 0
    seeds: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What stands in the table."""
        return self.label or str(self.pruner["type"] if isinstance(self.pruner, dict) else self.pruner)

    @property
    def selects(self) -> bool:
        """It retains tokens as they are, as a learned gate does."""
        return not create(self.pruner).merges

    def plan(self, keep: int, seed: int | None) -> PruningPlan:
        """Of a row."""
        config = {"type": self.pruner} if isinstance(self.pruner, str) else dict(self.pruner)
        config |= {} if seed is None else {"seed": seed}
        return PruningPlan([Stage(config, self.layer, keep_tokens=keep)])


@dataclass(frozen=True)
class Measuring:
    """What a file of estimators says.

    Attributes:
        base: the model of the second yardstick.
        out: folder of the results.
        estimators: names; empty takes all.
        steps: of the retrieval task: when to look; the last is where training ends.
        seeds: of the retrieval task.
        scorers: of the second yardstick, by the name of their column.
        base_estimators: names of those that run on it; empty takes all of `estimators`.
        base_seeds: one run per seed, estimator and scorer.
        trained_at: tokens per image in training.
        budgets: tokens per image in tests.
        num_images: held-out images.
        free: rules without training, for reference.
        recipe: of every run on the base.
        batch_size: sequences per call in tests.
    """

    base: str = "tiny_llava"
    out: str = "runs/estimators"
    estimators: tuple[str, ...] = ()
    steps: tuple[int, ...] = (60, 240)
    seeds: tuple[int, ...] = (0, 1)
    scorers: dict[str, Any] = field(default_factory=dict)
    base_estimators: tuple[str, ...] = ()
    base_seeds: tuple[int, ...] = (0,)
    trained_at: int = 16
    budgets: tuple[int, ...] = (16,)
    num_images: int = 256
    free: tuple[FreeRule, ...] = ()
    recipe: Settings = field(default_factory=dict)
    batch_size: int = 64

    @classmethod
    def from_file(cls, path: str) -> Measuring:
        """Read it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: unknown or malformed key, or an unknown estimator.
        """
        values = read_settings(path, "base, estimators, budgets")
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        rules = [
            rule if isinstance(rule, dict) and "pruner" in rule else {"pruner": rule} for rule in values.pop("free", ())
        ]
        with keys_of(cls, path):
            made = cls(free=tuple(FreeRule(**rule) for rule in rules), **values)
        made.chosen(), made.on_base()
        if not made.steps or list(made.steps) != sorted(set(made.steps)) or made.steps[0] < 1:
            raise ValueError(f"{path}: steps are rising counts such as [60, 240], got {list(made.steps)}.")
        return made

    def chosen(self) -> list[Estimator]:
        """The estimators to measure.

        Raises:
            ValueError: one is unknown.
        """
        return [find_estimator(name) for name in self.estimators or ESTIMATORS]

    def on_base(self) -> list[Estimator]:
        """Those to measure on the base.

        Raises:
            ValueError: one is unknown.
        """
        return [find_estimator(name) for name in self.base_estimators] or self.chosen()


@dataclass(frozen=True, eq=False)
class Cell:
    """One result.

    Attributes:
        table: retrieval, base or free.
        row: name of the estimator or rule.
        column: name of the scorer; empty where there is none.
        seed: of the run, or of a rule that takes one.
        keep: tokens per image in the test; 0 in the retrieval task.
        estimator: what is measured; None for rules.
        rule: None for estimators.
        training: its run; None without one.
    """

    table: str
    row: str
    column: str = ""
    seed: int | None = None
    keep: int = 0
    estimator: Estimator | None = None
    rule: FreeRule | None = None
    training: Training | None = None

    @property
    def name(self) -> str:
        """Its file."""
        parts = [self.table, self.row, self.column, str(self.keep or ""), "" if self.seed is None else f"s{self.seed}"]
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts if part)


def cells_of(measuring: Measuring) -> list[Cell]:
    """All cells: the retrieval task, the rules, then the base, seed by seed."""
    return [*_retrieval(measuring), *_free(measuring), *_base(measuring)]


def _retrieval(measuring: Measuring) -> Iterator[Cell]:
    for seed in measuring.seeds:
        for estimator in measuring.chosen():
            yield Cell("retrieval", estimator.name, seed=seed, estimator=estimator)


def _free(measuring: Measuring) -> Iterator[Cell]:
    if not measuring.scorers:
        return
    yield Cell("free", "dense")
    for keep in measuring.budgets:
        for rule in measuring.free:
            for seed in rule.seeds or (None,):
                yield Cell("free", rule.name, seed=seed, keep=keep, rule=rule)


def _base(measuring: Measuring) -> Iterator[Cell]:
    for seed in measuring.base_seeds:
        for column in measuring.scorers:
            for estimator in measuring.on_base():
                run = training_of(measuring, estimator, column, seed)
                for keep in measuring.budgets:
                    yield Cell("base", estimator.name, column, seed, keep, estimator, training=run)


def training_of(measuring: Measuring, estimator: Estimator, column: str, seed: int) -> Training:
    """The run of an estimator on the base: its scorer alone, everything else frozen."""
    alone = {"train": [], "pruner_phase": {"full_every": estimator.full_every, "losses": estimator.recipe_losses()}}
    recipe = merged(measuring.recipe, {"model": alone})
    plan = PruningPlan([Stage(estimator.pruner(measuring.scorers[column]), keep_tokens=measuring.trained_at)])
    name = Cell("run", estimator.name, column, seed).name
    return Training(name, recipe, plan, seed)
