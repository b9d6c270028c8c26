"""Measuring estimators: every cell is written before the next one starts, so an interrupted table goes on."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.data.benchmark import load_benchmark
from tpcompress.evaluation.engine.runs import Kept, train
from tpcompress.evaluation.scoring.evaluate import Prepared, Scores, evaluate, learnt_families, prepare
from tpcompress.files import atomic_path, write_atomic
from tpcompress.insertion.attach import attach, budgets, detach, is_attached, plan_of
from tpcompress.insertion.plan import Budget
from tpcompress.lab.estimators.cells import Cell, Measuring, cells_of
from tpcompress.lab.estimators.report import EstimatorReport
from tpcompress.lab.estimators.toy_run import train_scorer
from tpcompress.models import load_base, load_processor
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.diagnostics.estimator_results import write_marks

SAME = ("base", "steps", "trained_at", "num_images", "scorers", "recipe")
"""Settings that must not change while a folder fills."""


@dataclass
class Bench:
    """A table under way.

    Attributes:
        measuring: what to do.
        folder: of all results.
        console: where progress goes.
        kept: training pictures, encoded.
        tests: held-out rows collated, packed or not.
        loaded: name of the run that was last needed, and its model.
    """

    measuring: Measuring
    folder: Path
    console: Console
    kept: Kept = field(default_factory=dict)
    tests: dict[bool, Prepared] = field(default_factory=dict)
    loaded: tuple[str, Any] | None = None

    @classmethod
    def open(cls, measuring: Measuring, folder: Path, console: Console) -> Bench:
        """Make or find the folder.

        Raises:
            ValueError: it holds results of other settings.
        """
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        now = json.dumps({name: getattr(measuring, name) for name in SAME}, indent=2)
        if path.is_file() and path.read_text() != now:
            raise ValueError(f"{path} is of other settings; choose another --out or remove the folder.")
        write_atomic(path, now)
        return cls(measuring, folder, console)

    def work(self) -> list[dict[str, Any]]:
        """Make every missing cell, in order.

        Returns:
            The records of all cells.

        Raises:
            KeyboardInterrupt: interrupted; what is done is kept.
        """
        cells, records = cells_of(self.measuring), []
        for number, cell in enumerate(cells, 1):
            path = self.folder / "cells" / f"{cell.name}.json"
            if not path.is_file():
                start = time.perf_counter()
                try:
                    record = self._make(cell)
                except KeyboardInterrupt as stop:
                    done = f"{number - 1} of {len(cells)} cells are kept in {self.folder}"
                    raise KeyboardInterrupt(f"Interrupted; {done}, the same command goes on.") from stop
                record |= {"name": cell.name, "table": cell.table, "row": cell.row, "column": cell.column}
                record |= {"seed": cell.seed, "keep": cell.keep, "seconds": round(time.perf_counter() - start, 1)}
                write_atomic(path, json.dumps(record, indent=2))
                self.console.print(
                    f"{number}/{len(cells)} {cell.name}: {_said(record)}", highlight=False, soft_wrap=True
                )
            records.append(json.loads(path.read_text()))
        return records

    def scores(self, name: str) -> Scores:
        """The answers behind a cell, image by image."""
        return Scores.load(self.folder / "cells" / f"{name}.npz").with_learnt(self._learnt())

    # ------------------------------------------------------------------ a cell

    def _make(self, cell: Cell) -> dict[str, Any]:
        if cell.table == "retrieval":
            assert cell.estimator is not None and cell.seed is not None
            looks = train_scorer(cell.estimator, cell.seed, self.measuring.steps)
            return {"looks": [asdict(look) | {"enough": look.enough} for look in looks]}
        if cell.row == "dense":
            return self._dense(cell)
        if cell.rule is not None:
            attach(self.base, cell.rule.plan(cell.keep, cell.seed))
            try:
                return self._record(cell, self._test(self.base)) | {"selects": cell.rule.selects}
            finally:
                detach(self.base)
        model = self._trained(cell)
        with budgets(model, [Budget(keep_tokens=cell.keep)]):
            return self._record(cell, self._test(model))

    def _dense(self, cell: Cell) -> dict[str, Any]:
        """The base with all tokens; what it has learnt is what all scores average."""
        dense, blind = self._test(self.base), self._test(self.base, blank=True)
        learnt = learnt_families(dense, blind)
        write_atomic(self.folder / "learnt.json", json.dumps(learnt))
        return self._record(cell, dense)

    def _trained(self, cell: Cell) -> Any:
        """The model of a cell's run, trained now if it is not there."""
        run = cell.training
        assert run is not None
        if self.loaded is None or self.loaded[0] != run.name:
            folder = self.folder / "train" / run.name
            if not (folder / "done").is_file():
                train(run, self.measuring.base, folder, self.kept)
                write_atomic(folder / "done", run.made_of)
            self.loaded = (run.name, load_trained(folder).model)
        return self.loaded[1]

    def _test(self, model: Any, blank: bool = False) -> Scores:
        """A model on the held-out pictures, one question per sequence where a pruner reads it."""
        packed = not (is_attached(model) and plan_of(model).reads_prompt)
        if packed not in self.tests:
            size = self.measuring.batch_size
            self.tests[packed] = prepare(self.processor, self.rows, batch_size=size, pack=packed)
        return evaluate(model, self.processor, self.tests[packed], blank=blank)

    @cached_property
    def base(self) -> Any:
        """The base, dense between two cells."""
        return load_base(self.measuring.base).eval()

    @cached_property
    def processor(self) -> Any:
        """Of the base."""
        return load_processor(self.measuring.base)

    @cached_property
    def rows(self) -> Any:
        """Held-out pictures."""
        return load_benchmark("test", self.measuring.num_images)

    def _learnt(self) -> list[str]:
        found: list[str] = json.loads((self.folder / "learnt.json").read_text())
        return found

    def _record(self, cell: Cell, scores: Scores) -> dict[str, Any]:
        with atomic_path(self.folder / "cells" / f"{cell.name}.npz") as part:
            scores.save(part)
        scores = scores.with_learnt(self._learnt())
        return {"score": scores.score, "ci95": scores.ci95, "families": scores.families, "images": scores.num_images}


def _said(record: dict[str, Any]) -> str:
    if "looks" in record:
        return ", ".join(f"{look['accuracy']:.3f} after {look['step']} steps" for look in record["looks"])
    return f"{100 * record['score']:.1f} % ± {100 * record['ci95']:.1f}"


def run_estimators(config: str, out: str | None, marks: str | None, console: Console) -> EstimatorReport:
    """Measure what is missing, print the tables and write report.json, .csv and .md.

    Args:
        config: a file of estimators.
        out: folder of the results; default: the file's own.
        marks: file to write the marks of the retrieval task to; None leaves them in the report.
        console: where progress and tables go.
    """
    measuring = Measuring.from_file(config)
    folder = Path(out or measuring.out)
    bench = Bench.open(measuring, folder, console)
    meta = {
        name: getattr(measuring, name) for name in ("base", "num_images", "trained_at", "seeds", "base_seeds", "recipe")
    }
    report = EstimatorReport(bench.work(), bench.scores, meta)
    report.print(console)
    report.write(folder)
    if marks is not None:
        write_marks(report.marks(), Path(marks))
    console.print(f"[bold]{folder}[/bold]: report.json, report.csv, report.md", soft_wrap=True)
    return report
