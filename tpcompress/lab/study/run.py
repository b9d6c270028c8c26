"""The work of a study: make the model of a cell, test it, write it down, take the next that nobody else is at."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.data.benchmark import load_benchmark
from tpcompress.evaluation.engine.locks import claim
from tpcompress.evaluation.engine.runs import Kept, train
from tpcompress.evaluation.scoring.evaluate import Prepared, Scores, evaluate, prepare
from tpcompress.files import atomic_path, write_atomic
from tpcompress.insertion.attach import attach, controller_of, detach, is_attached
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.lab.study.cells import Cell, Training, fingerprint, runs_of
from tpcompress.lab.study.config import Study
from tpcompress.models import load_base, load_processor
from tpcompress.pruners import Pruner
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.nan_guard import NonFiniteLoss

PAUSE = 5.0
"""Seconds until a process that has nothing left looks whether others have let something go."""


@dataclass(frozen=True)
class Loaded:
    """A trained model without its plan, and the pruner that was on it."""

    name: str
    model: Any
    pruner: Pruner | None


@dataclass
class Workshop:
    """One process at work on a study.

    Attributes:
        study: what to do.
        folder: of all results.
        console: where progress goes.
        base: the dense base.
        processor: of the base.
        data: held-out rows.
        tests: the same rows collated, packed or not.
        kept: training pictures, encoded.
        loaded: the trained model that was last needed.
        failed: cells that this process cannot make, and why.
    """

    study: Study
    folder: Path
    console: Console
    base: Any
    processor: Any
    data: Any
    tests: dict[bool, Prepared] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    loaded: Loaded | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, study: Study, folder: Path, console: Console) -> Workshop:
        """Load what every cell needs.

        Raises:
            ValueError: the folder holds another study.
        """
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        path, now = folder / "study.json", fingerprint(study)
        if path.is_file() and path.read_text() != now:
            raise ValueError(f"{path} is of another study; choose another --out or remove the folder.")
        write_atomic(path, now)
        base = load_base(study.base)
        data = load_benchmark("test", study.num_images, study.seed)
        return cls(study, folder, console, base.eval(), load_processor(study.base), data)

    def work(self, cells: Sequence[Cell]) -> int:
        """Make what is missing, in order; what another process is at comes again until it is done.

        Returns:
            How many cells this process made.

        Raises:
            ValueError: a run in the folder was made otherwise than the study says, or one met a loss that is no number.
            KeyboardInterrupt: interrupted; what is done is kept.
        """
        self._check_runs(cells)
        made, left = 0, list(cells)
        try:
            while left := [c for c in left if not self.path(c).is_file() and c.name not in self.failed]:
                before = made
                for cell in left:
                    made += self._try(cell, cells)
                if made == before:
                    time.sleep(PAUSE)
        except KeyboardInterrupt as stop:
            kept = f"{made} cells were made and are kept in {self.folder}"
            raise KeyboardInterrupt(f"Interrupted; {kept}, the same command goes on.") from stop
        if self.failed:
            name, why = next(iter(self.failed.items()))
            raise ValueError(f"{len(self.failed)} cells could not be made, {name} first: {why} All others are there.")
        return made

    def path(self, cell: Cell) -> Path:
        """Of a cell's result."""
        return self.folder / "cells" / f"{cell.name}.json"

    # ------------------------------------------------------------------ a cell

    def _try(self, cell: Cell, cells: Sequence[Cell]) -> bool:
        """Make a cell unless it is there, or it or its runs are in other hands."""
        with claim(self._lock(f"cell-{cell.name}")) as mine:
            if not mine or self.path(cell).is_file():
                return False
            start, new = time.perf_counter(), any(not self._done(training).is_file() for training in runs_of(cell))
            try:
                if not all(self._trained(training) for training in runs_of(cell)):
                    return False
            except NonFiniteLoss as error:
                self.failed[cell.name] = str(error)
                return False
            trained = time.perf_counter()
            scores = self._test(cell)
            self._write(cell, scores, new, trained - start, time.perf_counter() - trained)
            self._say(cell, scores, cells)
        return True

    def _trained(self, training: Training) -> bool:
        """See to it that a run is done; False if another process is at it."""
        done = self._done(training)
        with claim(self._lock(f"train-{training.name}")) as mine:
            if done.is_file():
                return True
            if not mine:
                return False
            train(training, self.study.base, self._run_folder(training), self.kept)
            write_atomic(done, training.made_of)
        return True

    def _check_runs(self, cells: Sequence[Cell]) -> None:
        """See that the runs in the folder are those of the study: a changed recipe keeps its name."""
        for training in {t.name: t for cell in cells for t in runs_of(cell)}.values():
            done = self._done(training)
            if done.is_file() and done.read_text() != training.made_of:
                raise ValueError(
                    f"{done.parent} was trained with another recipe or plan than the study says; give the changed arm "
                    f"another name, or choose another --out."
                )

    def _test(self, cell: Cell) -> Scores:
        model, plan = self.base, cell.plan
        if cell.gate is not None and plan is not None:
            plan = _with_weights(plan, self._load(cell.gate).pruner)
        if cell.training is not None:
            model = self._load(cell.training).model
        if plan is not None:
            attach(model, plan)
        try:
            data = self._tests(plan is None or not plan.reads_prompt)
            return evaluate(model, self.processor, data, blank=cell.blank)
        finally:
            if plan is not None:
                detach(model)

    def _tests(self, packed: bool) -> Prepared:
        if packed not in self.tests:
            self.tests[packed] = prepare(self.processor, self.data, batch_size=self.study.batch_size, pack=packed)
        return self.tests[packed]

    def _load(self, training: Training) -> Loaded:
        """A trained model, as it came from its run but for the plan, which is taken off."""
        if self.loaded is None or self.loaded.name != training.name:
            model: Any = load_trained(self._run_folder(training)).model
            pruner = None
            if is_attached(model):
                pruner = copy.deepcopy(controller_of(model).pruners[-1])
                detach(model)
            self.loaded = Loaded(training.name, model.eval(), pruner)  # type: ignore[arg-type]
        return self.loaded

    def _run_folder(self, training: Training) -> Path:
        return self.folder / "train" / training.name

    def _done(self, training: Training) -> Path:
        return self._run_folder(training) / "done"

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"

    # ------------------------------------------------------------------ records

    def _write(self, cell: Cell, scores: Scores, trained: bool, train_seconds: float, test_seconds: float) -> None:
        """The answers of every image first, then the record that says the cell is done."""
        path = self.path(cell)
        with atomic_path(path.with_suffix(".npz")) as part:
            scores.save(part)
        names = ("name", "table", "pruner", "way", "budget", "seed", "tested", "tested_budget")
        record = {name: getattr(cell, name) for name in names}
        record |= {"exact_match": scores.families, "images": scores.num_images, "answers": f"{cell.name}.npz"}
        record |= {"trained": trained, "train_seconds": round(train_seconds, 1), "test_seconds": round(test_seconds, 1)}
        write_atomic(path, json.dumps(record, indent=2))

    def _say(self, cell: Cell, scores: Scores, cells: Sequence[Cell]) -> None:
        done = [c for c in cells if self.path(c).is_file()]
        minutes = self._left(done, [c for c in cells if not self.path(c).is_file()]) / 60
        what = f"{len(done)}/{len(cells)} {cell.name}: {100 * scores.score:.1f} % over all families"
        self.console.print(f"{what}; about {minutes:.0f} min of one process left", highlight=False, soft_wrap=True)

    def _left(self, done: Sequence[Cell], left: Sequence[Cell]) -> float:
        """Seconds of the cells to come, from those of their kind that are there."""
        known: dict[str, list[float]] = {}
        for cell in done:
            record = json.loads(self.path(cell).read_text())
            for kind in (f"tested {cell.tested}", "tested "):
                known.setdefault(kind, []).append(record["test_seconds"])
            for kind in (f"trained {cell.pruner}", "trained ") if record["trained"] else ():
                known.setdefault(kind, []).append(record["train_seconds"])
        runs = {c.training.name: c for c in left if c.training is not None}
        new = [c for c in runs.values() if c.training is not None and not self._done(c.training).is_file()]
        training = sum(_mean(known, f"trained {cell.pruner}", "trained ") for cell in new)
        return training + sum(_mean(known, f"tested {cell.tested}", "tested ") for cell in left)


def _with_weights(plan: PruningPlan, pruner: Pruner | None) -> PruningPlan:
    """The plan with a trained pruner in its last stage."""
    assert pruner is not None
    stage = plan.stages[-1]
    trained = Stage(pruner, stage.layer, stage.keep_ratio, stage.keep_tokens)
    return PruningPlan([*plan.stages[:-1], trained], plan.positions, plan.scope)


def _mean(known: dict[str, list[float]], kind: str, any_kind: str) -> float:
    """Seconds of a kind of work, of any kind where that one is new, nothing where all is."""
    values = known.get(kind) or known.get(any_kind) or [0.0]
    return sum(values) / len(values)
