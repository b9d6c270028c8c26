"""The bench: makes cells on one base model and one task, in a folder that several processes may fill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from tpcompress.data.blank import blank_images
from tpcompress.evaluation.engine.cell import Cell, Made, Run, check_names
from tpcompress.evaluation.engine.claimed import claim_folder
from tpcompress.evaluation.engine.counts import mean_vision_tokens
from tpcompress.evaluation.engine.fingerprint import base_digest, digest_of
from tpcompress.evaluation.engine.locks import claim
from tpcompress.evaluation.engine.progress import report_line
from tpcompress.evaluation.engine.runs import Kept, Trained, check_run, is_done, load_run, train
from tpcompress.evaluation.scoring.batches import Change, Prepared
from tpcompress.evaluation.scoring.evaluate import Watch, why_never_packed
from tpcompress.evaluation.scoring.metrics import find_metric, name_of
from tpcompress.evaluation.scoring.scores import Scores, learnt_families
from tpcompress.evaluation.tasks import Task
from tpcompress.files import atomic_path, write_atomic
from tpcompress.insertion.attach import is_attached, plan_of
from tpcompress.models import load_base, load_processor
from tpcompress.training.nan_guard import NonFiniteLoss

PAUSE = 5.0
"""Seconds between two looks at the cells that other processes hold."""


@dataclass
class Bench:
    """One process at work on the cells of a folder.

    Attributes:
        base: name of the base model.
        task: what models are tested on.
        folder: output directory.
        console: console for progress.
        metric: metric of the scores.
        batch_size: sequences per call in tests.
        dtype: dtype of the base's weights.
        device: device of base and trained models; None leaves them where they are loaded.
        many_runs: many short training runs: their images are encoded once, they show no progress and write no logs.
        runs: folder of training runs; default: `train` in the folder.
        tests: the rows of the task, collated: packed or one question per sequence, blank or not.
        kept: encoded training images.
        loaded: the trained model that was needed last.
        failed: cells that this process could not make, and the reason.
    """

    base: str
    task: Task
    folder: Path
    console: Console
    metric: str = ""
    batch_size: int = 64
    dtype: str = "float32"
    device: str | None = None
    many_runs: bool = False
    runs: Path | None = None
    tests: dict[tuple[bool, bool], Prepared] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    loaded: Trained | None = None
    failed: dict[str, str] = field(default_factory=dict)
    _keys: dict[str, Any] = field(default_factory=dict, repr=False)
    _run_keys: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.metric = name_of(find_metric(self.metric or self.task.metric))

    # ------------------------------------------------------------------ what all cells share

    @cached_property
    def model(self) -> Any:
        """The dense base, in eval mode; dense again after every cell."""
        model: Any = load_base(self.base, self.dtype)
        return (model if self.device is None else model.to(self.device)).eval()

    @cached_property
    def processor(self) -> Any:
        """Processor of the base."""
        return load_processor(self.base)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The part of the key that all cells share: base model and data by content, task, metric."""
        task = {name: value for name, value in self.task.config().items() if name != "metric"}
        shared = {"base": base_digest(self.base), "data": self.task.fingerprint}
        dtype = {} if self.dtype == "float32" else {"dtype": self.dtype}
        return {**shared, "task": task, "metric": self.metric, **dtype}

    @cached_property
    def vision_tokens(self) -> float:
        """Vision tokens of a question after the projector: of all its images, in the mean over questions with an image.

        Raises:
            ValueError: no row has an image.
        """
        found = mean_vision_tokens(self.model, self.prepared(True).batches)
        if found is None:
            raise ValueError(
                f"No row of {self.task.description} has an image, so there are no vision tokens to prune; give rows "
                f"with images."
            )
        return found

    @cached_property
    def packs(self) -> bool:
        """Questions about an image can share its sequence in this family."""
        return why_never_packed(self.model, self.processor) is None

    def prepared(self, packed: bool, blank: bool = False) -> Prepared:
        """The rows of the task, collated once.

        Args:
            packed: questions about an image share its sequence, where the family allows it.
            blank: images are blank.
        """
        key = (packed and self.packs, blank)
        if key not in self.tests:
            self.tests[key] = self.collated(self.processor, blank_images if blank else None, key[0])
        return self.tests[key]

    def collated(self, processor: Any, change: Change | None = None, packed: bool = True) -> Prepared:
        """The rows of the task for one test, with another processor or changed rows."""
        return self.task.prepare(processor, self.batch_size, packed and self.packs, change, self.metric)

    def test(self, model: nn.Module, blank: bool = False, watch: Watch | None = None) -> Scores:
        """Answers of a model, pruned as attached; one question per sequence where the plan reads the prompt."""
        data = self.prepared(not (is_attached(model) and plan_of(model).reads_prompt), blank)
        return self.task.score(model, self.processor, data, watch=watch, metric=self.metric)

    def share(self, other: Bench) -> None:
        """Take over model and processor of a bench on the same base."""
        self.__dict__ |= {"model": other.model, "processor": other.processor}

    def trained(self, run: Run) -> Trained:
        """The model of a finished run."""
        if self.loaded is None or self.loaded.name != run.name:
            self.loaded = load_run(run, self.run_folder(run))
            if self.device is not None:
                self.loaded.model.to(self.device)
        return self.loaded

    # ------------------------------------------------------------------ results

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell; None if it is missing, or was made under another key."""
        path = self._path(cell)
        if not path.is_file():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        return record if record.get("key") == self._key(cell) else None

    def scores(self, cell: Cell) -> Scores | None:
        """The answers of a cell; None as in `record`."""
        path = self._path(cell).with_suffix(".npz")
        return None if self.record(cell) is None or not path.is_file() else Scores.load(path)

    def learnt(self, dense: Cell, blind: Cell) -> list[str] | None:
        """Families in which the image matters to the base; None until base and blank baseline are there."""
        answers, blanked = self.scores(dense), self.scores(blind)
        return None if answers is None or blanked is None else learnt_families(answers, blanked)

    def run_folder(self, run: Run) -> Path:
        """Folder of a training run."""
        return (self.runs or self.folder / "train") / run.name

    # ------------------------------------------------------------------ work

    def check(self, cells: Sequence[Cell]) -> None:
        """Refuse cells that would share a file, and a folder that holds other results.

        Raises:
            ValueError: the folder holds results of another base, task, data or metric, of an earlier version, or a run
                of another recipe.
        """
        check_names(cells)
        claim_folder(self.folder, self.common if any(cell.on_model for cell in cells) else None)
        for run in {run.name: run for cell in cells for run in cell.runs}.values():
            check_run(self.run_folder(run), self._run_key(run))

    def work(self, cells: Sequence[Cell], after: Callable[[Cell], object] | None = None) -> int:
        """Make the cells that are missing, in order; cells that another process holds are looked at again.

        Args:
            cells: all cells of the folder.
            after: called with every cell that was made.

        Returns:
            Number of cells made by this process.

        Raises:
            ValueError: see `check`; or a training run met a NaN.
            KeyboardInterrupt: interrupted; finished cells and runs are kept.
        """
        self.check(cells)
        made: set[str] = set()
        try:
            while left := [c for c in cells if c.name not in self.failed and self.record(c) is None]:
                again = next((cell.name for cell in left if cell.name in made), None)
                if again is not None:
                    raise ValueError(f"Another process fills {self.folder} with other settings ({again}); stop it.")
                before = len(made)
                for cell in left:
                    if self._try(cell, cells):
                        made.add(cell.name)
                        if after is not None:
                            after(cell)
                if len(made) == before:
                    time.sleep(PAUSE)
        except KeyboardInterrupt as stop:
            done = sum(self.record(cell) is not None for cell in cells)
            kept = f"{done} of {len(cells)} cells are kept in {self.folder}"
            raise KeyboardInterrupt(f"Interrupted; {kept}, the same command goes on.") from stop
        if self.failed:
            name, why = next(iter(self.failed.items()))
            raise ValueError(f"{len(self.failed)} cells could not be made, {name} first: {why} All others are there.")
        return len(made)

    def _try(self, cell: Cell, cells: Sequence[Cell]) -> bool:
        """Make a cell, unless it is there or another process holds it or one of its runs."""
        with claim(self._lock(f"cell-{cell.name}")) as mine:
            if not mine or self.record(cell) is not None:
                return False
            start = time.perf_counter()
            new = [run for run in cell.runs if not is_done(self.run_folder(run))]
            try:
                if not all(self._finish(run) for run in cell.runs):
                    return False
            except NonFiniteLoss as error:
                self.failed[cell.name] = str(error)
                return False
            trained = time.perf_counter()
            made = cell.make(self)
            seconds = {"train_seconds": trained - start if new else None, "test_seconds": time.perf_counter() - trained}
            self._write(cell, made, {k: v if v is None else round(v, 1) for k, v in seconds.items()})
            self._report(cell, made, cells)
        return True

    def _finish(self, run: Run) -> bool:
        """Train a run if it is not finished; False if another process is training it."""
        folder = self.run_folder(run)
        with claim(self._lock(f"train-{run.name}")) as mine:
            if not mine:
                return is_done(folder)
            if not is_done(folder):
                if not self.many_runs:
                    self.console.print(f"training {run.name} …", highlight=False)
                train(run, self.base, folder, self._run_key(run), self.kept if self.many_runs else None)
        return True

    # ------------------------------------------------------------------ files

    def _key(self, cell: Cell) -> Any:
        """The key of a cell, as JSON gives it back."""
        if cell.name not in self._keys:
            key = cell.key(self.common if cell.on_model else {})
            key |= {"runs": {run.name: digest_of(self._run_key(run)) for run in cell.runs}}
            self._keys[cell.name] = json.loads(json.dumps(key, default=str))
        return self._keys[cell.name]

    def _run_key(self, run: Run) -> dict[str, Any]:
        if run.name not in self._run_keys:
            self._run_keys[run.name] = run.key(self.common["base"])
        return self._run_keys[run.name]

    def _write(self, cell: Cell, made: Made, seconds: dict[str, Any]) -> None:
        """The answers of every image first, then the record, which says that the cell is done."""
        path = self._path(cell)
        for old in (path, path.with_suffix(".npz")):  # of an older key: it must not stand beside newer answers
            old.unlink(missing_ok=True)
        if made.scores is not None:
            with atomic_path(path.with_suffix(".npz")) as part:
                made.scores.save(part)
        record = {"name": cell.name, "metric": self.metric, **cell.labels, **made.record, **seconds}
        record["key"] = self._key(cell)
        write_atomic(path, json.dumps(record, indent=1))

    def _report(self, cell: Cell, made: Made, cells: Sequence[Cell]) -> None:
        """A line on the console."""
        records = {c.name: self.record(c) for c in cells}
        waiting = {run.name for c in cells for run in c.runs if not is_done(self.run_folder(run))}
        line = report_line(cell.name, made, find_metric(self.metric).unit, cells, records, waiting)
        self.console.print(line, highlight=False, soft_wrap=True)

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"
