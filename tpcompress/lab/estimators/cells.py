"""The cells of an estimator table: the toy task, pruners without training, and runs on the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.cell import Cell, Made, Run, check_names, slug
from tpcompress.evaluation.engine.fingerprint import code_digest, file_digest
from tpcompress.evaluation.engine.model_cell import ModelCell
from tpcompress.evaluation.engine.plans import one_stage
from tpcompress.insertion.plan import Budget
from tpcompress.lab.estimators import toy_run, toy_task
from tpcompress.lab.estimators.catalogue import Estimator
from tpcompress.lab.estimators.config import EstimatorTable
from tpcompress.lab.estimators.toy_run import train_scorer
from tpcompress.lab.study.cells import merged

TOY, FREE, BASE, DENSE, BLIND = "retrieval", "free", "base", "dense", "blind"
"""Names of the tables, and of the two rows without a pruner."""


@dataclass(frozen=True, eq=False)
class EstimatorCell(ModelCell):
    """One test on the base. Labels: `table`, `row`, `column` (scorer), `seed`, `keep` (tokens), `selects`."""


@dataclass(frozen=True, eq=False)
class ToyCell(Cell):
    """One estimator on the toy task. Labels as those of `EstimatorCell`.

    Attributes:
        estimator: the estimator.
        steps: steps after which the scorer is tested.
    """

    estimator: Estimator
    steps: tuple[int, ...]

    @property
    def on_model(self) -> bool:
        """The toy task has a model and data of its own."""
        return False

    def key(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """The estimator with its losses, steps and seed, and the source code of pruner and toy task."""
        plan = one_stage(self.estimator.pruner(), 0, Budget(keep_tokens=toy_task.KEEP))
        files = [Path(str(toy_run.__file__)), Path(str(toy_task.__file__)), toy_task.WEIGHTS]
        values = asdict(self.estimator) | {"steps": self.steps, "seed": self.labels["seed"]}
        return {**common, "estimator": values, "code": code_digest(plan), "task": [file_digest(file) for file in files]}

    def make(self, bench: Bench) -> Made:
        """Train the scorer and test it on the way."""
        looks = train_scorer(self.estimator, self.labels["seed"], self.steps)
        said = ", ".join(f"{look.accuracy:.3f} after {look.step} steps" for look in looks)
        return Made({"looks": [asdict(look) | {"enough": look.enough} for look in looks], "summary": said})


def cells_of(table: EstimatorTable) -> list[Cell]:
    """All cells: the toy task, pruners without training, then the base, seed by seed.

    Raises:
        ValueError: two rows or columns would share a file.
    """
    cells = [*_on_toy(table), *_free(table), *_on_base(table)]
    check_names(cells)
    return cells


def run_of(table: EstimatorTable, estimator: Estimator, column: str, seed: int) -> Run:
    """The run of an estimator on the base: its scorer alone, everything else frozen."""
    alone = {"train": [], "pruner_phase": {"full_every": estimator.full_every, "losses": estimator.recipe_losses()}}
    plan = one_stage(estimator.pruner(table.scorers[column]), 0, Budget(keep_tokens=table.trained_at))
    name = slug(f"run-{estimator.name}-{column}-s{seed}")
    return Run(name, merged(table.recipe, {"model": alone}), plan, seed)


def _on_toy(table: EstimatorTable) -> Iterator[Cell]:
    for seed in table.seeds:
        for estimator in table.on_toy():
            yield ToyCell(*_identity(TOY, estimator.name, seed=seed), estimator, table.steps)


def _free(table: EstimatorTable) -> Iterator[Cell]:
    if not table.scorers:
        return
    yield EstimatorCell(*_identity(FREE, DENSE))
    yield EstimatorCell(*_identity(FREE, BLIND), blank=True)
    for keep in table.budgets:
        for pruner in table.free:
            for seed in pruner.seeds or (None,):
                name, labels = _identity(FREE, pruner.name, seed=seed, keep=keep)
                plan = pruner.plan(Budget(keep_tokens=keep), seed)
                yield EstimatorCell(name, labels | {"selects": pruner.selects}, plan)


def _on_base(table: EstimatorTable) -> Iterator[Cell]:
    for seed in table.base_seeds:
        for column in table.scorers:
            for estimator in table.on_base():
                run = run_of(table, estimator, column, seed)
                for keep in table.budgets:
                    plan = one_stage(estimator.pruner(table.scorers[column]), 0, Budget(keep_tokens=keep))
                    yield EstimatorCell(*_identity(BASE, estimator.name, column, seed, keep), plan, run, run)


def _identity(
    table: str, row: str, column: str = "", seed: int | None = None, keep: int = 0
) -> tuple[str, dict[str, Any]]:
    """File name and labels of a cell."""
    parts = [table, row, column, str(keep or ""), "" if seed is None else f"s{seed}"]
    labels = {"table": table, "row": row, "column": column, "seed": seed, "keep": keep}
    return slug("-".join(part for part in parts if part)), labels
