"""The work of a study: make the model of a cell, test it, write it down, take the next that nobody else is at."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.data.benchmark import load_benchmark
from tpcompress.evaluation.score import Prepared, Scores, evaluate, prepare
from tpcompress.evaluation.study import Study
from tpcompress.evaluation.study_cells import Cell, Training, fingerprint
from tpcompress.evaluation.study_claims import claim, write_whole
from tpcompress.evaluation.study_train import Kept, train
from tpcompress.insertion.attach import attach, controller_of, detach, is_attached
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner
from tpcompress.training.checkpoint import load_trained
from tpcompress.training.module import load_base, load_processor

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
        write_whole(path, now)
        base = load_base(study.base)
        data = load_benchmark("test", study.num_images, study.seed)
        return cls(study, folder, console, base.eval(), load_processor(study.base), data)

    def work(self, cells: Sequence[Cell]) -> int:
        """Make what is missing, in order; what another process is at comes again until it is done.

        Returns:
            How many cells this process made.
        """
        made, left = 0, list(cells)
        while left := [cell for cell in left if not self.path(cell).is_file()]:
            before = made
            for cell in left:
                made += self._try(cell, cells)
            if made == before:
                time.sleep(PAUSE)
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
            start = time.perf_counter()
            for training in {id(t): t for t in (cell.training, cell.gate) if t is not None}.values():
                if not self._trained(training):
                    return False
            trained = time.perf_counter()
            scores = self._test(cell)
            self._write(cell, scores, trained - start, time.perf_counter() - trained)
            self._say(cell, scores, cells)
        return True

    def _trained(self, training: Training) -> bool:
        """See to it that a run is done; False if another process is at it."""
        done = self._run_folder(training) / "done"
        with claim(self._lock(f"train-{training.name}")) as mine:
            if done.is_file():
                return True
            if not mine:
                return False
            train(training, self.study.base, self._run_folder(training), self.kept)
            done.touch()
        return True

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

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"

    # ------------------------------------------------------------------ records

    def _write(self, cell: Cell, scores: Scores, train_seconds: float, test_seconds: float) -> None:
        """The answers of every image first, then the record that says the cell is done."""
        path = self.path(cell)
        part = path.with_suffix(".part.npz")
        scores.save(part)
        os.replace(part, path.with_suffix(".npz"))
        names = ("name", "table", "pruner", "way", "budget", "seed", "tested", "tested_budget")
        record = {name: getattr(cell, name) for name in names}
        record |= {"exact_match": scores.families, "images": scores.num_images, "answers": f"{cell.name}.npz"}
        record |= {"train_seconds": round(train_seconds, 1), "test_seconds": round(test_seconds, 1)}
        write_whole(path, json.dumps(record, indent=2))

    def _say(self, cell: Cell, scores: Scores, cells: Sequence[Cell]) -> None:
        done = [c for c in cells if self.path(c).is_file()]
        minutes = self._left(done, [c for c in cells if not self.path(c).is_file()]) / 60
        what = f"{len(done)}/{len(cells)} {cell.name}: {100 * scores.score:.1f} % over all families"
        self.console.print(f"{what}; about {minutes:.0f} min of one process left", highlight=False, soft_wrap=True)

    def _left(self, done: Sequence[Cell], left: Sequence[Cell]) -> float:
        """Seconds of the cells to come, from those of their kind that are there."""
        known: dict[str, list[tuple[float, float]]] = {}
        for cell in done:
            record = json.loads(self.path(cell).read_text())
            times = (record["train_seconds"], record["test_seconds"])
            for kind in ("", f"trained {cell.pruner}", f"tested {cell.tested}"):
                known.setdefault(kind, []).append(times)

        def mean(kind: str, which: int) -> float:
            values = [t[which] for t in known.get(kind, known[""]) if t[which] > 1 or which]
            return sum(values) / len(values) if values else 0.0

        runs = {c.training.name: c for c in left if c.training is not None}
        new = [c for name, c in runs.items() if not (self.folder / "train" / name / "done").is_file()]
        return sum(mean(f"trained {c.pruner}", 0) for c in new) + sum(mean(f"tested {c.tested}", 1) for c in left)


def _with_weights(plan: PruningPlan, pruner: Pruner | None) -> PruningPlan:
    """The plan with a trained pruner in its last stage."""
    assert pruner is not None
    stage = plan.stages[-1]
    trained = Stage(pruner, stage.layer, stage.keep_ratio, stage.keep_tokens)
    return PruningPlan([*plan.stages[:-1], trained], plan.positions, plan.scope)
