"""Measure the accuracy of an exported folder at several budgets, for the table of its model card."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import Progress

from tpcompress.bundled import base_path
from tpcompress.data.collate import BatchMeta
from tpcompress.evaluation.scoring.batches import Rows
from tpcompress.evaluation.scoring.evaluate import evaluate, learnt_families
from tpcompress.evaluation.tasks import Task, create_task
from tpcompress.export import load, load_processor
from tpcompress.export.budgets import CurvePoint, ranges_of, was_trained, with_budgets, words
from tpcompress.files import write_atomic
from tpcompress.insertion.attach import budgets
from tpcompress.insertion.plan import Budget, PruningPlan
from tpcompress.insertion.trace import Trace
from tpcompress.models import load_base
from tpcompress.training.checkpoints.read import checkpoint_file
from tpcompress.training.checkpoints.run_folder import instantiate, read_recipe
from tpcompress.training.datamodules import benchmark, chat  # noqa: F401  registers classes for recipes

IMAGES = 320
"""Number of benchmark images, as in the quickstart."""
CACHE = "budget_curve.json"


@dataclass(frozen=True)
class Questions:
    """Data on which a curve is measured.

    Attributes:
        task: task with the rows.
        data: description of the data, for the card.
        seed: seed of the rows.
        batch_size: sequences per batch.
        learnt: families that the accuracy averages; None for all.
    """

    task: Task
    data: str
    seed: int
    batch_size: int
    learnt: tuple[str, ...] | None = None


class RunRows(Task):
    """The validation rows of a training run."""

    name = "validation rows of a run"

    def __init__(self, rows: Rows) -> None:
        self._held_out = rows

    def load(self) -> Rows:
        """Return the rows; images are decoded when a row is used."""
        return self._held_out

    @property
    def description(self) -> str:
        """`the run's validation rows`."""
        return "the run's validation rows"


class BudgetCurve:
    """Measures an export at several budgets.

    Results are stored in the run folder, so that an interrupted measurement resumes.

    Args:
        text: budgets such as `9,16,36` or `0.1,0.25`; for a plan with several stages `32/8,16/4`.
        console: console for progress.
        checkpoint: checkpoint of the run, or its folder; None for a plan without training.
        task: task to measure on; default: the benchmark for a bundled base, else the validation rows of the run.

    Raises:
        ValueError: a budget is invalid.
    """

    def __init__(
        self,
        text: str,
        console: Console,
        checkpoint: str | None = None,
        task: Task | str | dict[str, Any] | None = None,
    ) -> None:
        self.budgets, self.console = read_budgets(text), console
        self.cache = None if checkpoint is None else checkpoint_file(checkpoint).parent.parent / CACHE
        self.task = None if task is None else create_task(task)

    def __call__(self, folder: Path, manifest: dict[str, Any]) -> list[CurvePoint]:
        """Measure the export in `folder`.

        Raises:
            ValueError: the number of budgets per stage is wrong, budgets increase, or there is no data.
            KeyboardInterrupt: interrupted; the message says how many results are stored.
        """
        plan = PruningPlan.from_dict(manifest["plan"])
        for values in self.budgets:
            with_budgets(plan, values)
        questions = questions_of(folder, manifest["trained_with"].get("base"), self.task)
        key = {"export": _fingerprint(folder), "data": questions.data, "rows": questions.task.fingerprint}
        done = self._read(key)
        model, processor = _placed(load(folder)), load_processor(folder)
        with Progress(console=self.console, transient=True) as progress:
            for values in self.budgets:
                name = words(values)
                try:
                    if name not in done:
                        done[name] = _point(model, processor, questions, values, manifest, progress)
                        self._write(key, done)
                except KeyboardInterrupt as stop:
                    resume = "run the same command to resume" if self.cache is not None else "results are not stored"
                    ready = sum(words(each) in done for each in self.budgets)
                    raise KeyboardInterrupt(
                        f"Interrupted with {ready} of {len(self.budgets)} budgets measured; {resume}."
                    ) from stop
                point = done[name]
                shown = f"{100 * point.accuracy:.1f} % ± {100 * point.ci95:.1f}"
                self.console.print(f"  {name}: {shown}", highlight=False)
        return [done[words(values)] for values in self.budgets]

    def _read(self, key: dict[str, Any]) -> dict[str, CurvePoint]:
        """Stored results of the same export on the same data."""
        if self.cache is None or not self.cache.is_file():
            return {}
        try:
            found = json.loads(self.cache.read_text(encoding="utf-8"))
            return {p["budget"]: CurvePoint(**p) for p in found["points"]} if found["key"] == key else {}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.cache} is damaged ({type(error).__name__}); remove it.") from error

    def _write(self, key: dict[str, Any], done: dict[str, CurvePoint]) -> None:
        if self.cache is None:
            return
        points = [point.to_dict() for point in done.values()]
        write_atomic(self.cache, json.dumps({"key": key, "points": points}, indent=1) + "\n")


def read_budgets(text: str) -> list[list[Budget]]:
    """Parse budgets of the command line: counts, or ratios if there is a decimal point.

    Raises:
        ValueError: a budget is invalid or repeated.
    """
    found = [[_budget(word, text) for word in entry.split("/")] for entry in text.replace(" ", "").split(",")]
    if len({words(values) for values in found}) < len(found):
        raise ValueError(f"budgets: '{text}' names one twice; leave it out.")
    return found


def questions_of(folder: Path, base: str | None, task: Task | None = None) -> Questions:
    """The data for a curve: a given task, the benchmark for a bundled base, else the validation rows of the run.

    Args:
        folder: exported folder, with the recipe of its run.
        base: name of the base model.
        task: task to use instead.

    Raises:
        ValueError: there is no task, the base is not bundled, and there is no recipe or no validation data.
    """
    if task is not None:
        return Questions(task, task.description, 0, 64)
    if base is not None and base_path(base) != base:
        task = create_task({"type": "benchmark", "num_images": IMAGES})
        model, processor = _placed(load_base(base)), load_processor(base_path(base))
        dense, blind = (task.score(model, processor, blank=each) for each in (False, True))
        learnt = tuple(learnt_families(dense, blind))
        data = f"{task.description}, families that the base has learnt ({len(learnt)})"
        return Questions(task, data, 0, 64, learnt)
    recipe = read_recipe(folder / "recipe.yaml")
    if recipe is None:
        raise ValueError("budgets are measured on the data of a run, and there is no recipe.yaml; leave --budgets out.")
    module: Any = instantiate(LightningDataModule, recipe.get("data"))
    held_out = None if module is None else module.load_rows()[1]
    if not held_out:
        raise ValueError(
            "The run's data have no rows to validate on; set data val or val_fraction, or leave --budgets out."
        )
    task = RunRows(held_out)
    return Questions(task, task.description, module.seed, module.batch_size)


def _point(
    model: Any, processor: Any, questions: Questions, values: list[Budget], manifest: dict[str, Any], progress: Progress
) -> CurvePoint:
    """Measure one budget."""
    retained: list[int] = []

    def watch(trace: Trace, _: BatchMeta) -> None:
        retained.extend(trace.stages[-1].vision_out if trace.stages else [])

    with budgets(model, values):
        scores = evaluate(
            model, processor, questions.task.rows, batch_size=questions.batch_size, learnt=questions.learnt,
            progress=progress, watch=watch,
        )  # fmt: skip
    ranges = ranges_of(manifest)
    return CurvePoint(
        budget=words(values),
        retained=sum(retained) / max(1, len(retained)),
        accuracy=scores.score,
        ci95=scores.ci95,
        token_accuracy=scores.overall("token_accuracy"),
        loss=-scores.overall("log_likelihood"),
        questions=int(scores.count_IF.sum()),
        images=scores.num_images,
        data=questions.data,
        seed=questions.seed,
        trained=None if ranges is None else was_trained(values, ranges, manifest["vision_tokens"]),
    )


def _budget(word: str, text: str) -> Budget:
    try:
        return Budget(keep_ratio=float(word)) if "." in word else Budget(keep_tokens=int(word))
    except ValueError as error:
        reason = f" ({error})" if "keep_" in str(error) else ""
        raise ValueError(
            f"budgets: '{word}' in '{text}' is not a count or ratio{reason}; give 9,16 or 0.1,0.25."
        ) from error


def _fingerprint(folder: Path) -> str:
    """Hash of weights, config and recipe, which identifies an export."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("recipe.yaml")]):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _placed(model: Any) -> Any:
    """Move a model to the accelerator, if there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.eval() if device is None else model.to(device).eval()
