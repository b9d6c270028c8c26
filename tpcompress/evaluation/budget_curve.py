"""Accuracy over budgets of an export, measured on the folder as it is written: the table of its card."""

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
from tpcompress.data.benchmark import load_benchmark
from tpcompress.data.collate import BatchMeta
from tpcompress.evaluation.scoring.evaluate import Rows, evaluate, learnt_families
from tpcompress.export.budgets import CurvePoint, ranges_of, was_trained, with_budgets, words
from tpcompress.export.load import load, load_processor
from tpcompress.files import write_atomic
from tpcompress.insertion.attach import budgets
from tpcompress.insertion.plan import Budget, PruningPlan
from tpcompress.insertion.trace import Trace
from tpcompress.models import load_base
from tpcompress.training.checkpoints.run_folder import made, read_recipe
from tpcompress.training.checkpoints.state import checkpoint_file
from tpcompress.training.datamodules import chat_benchmark as datamodule  # noqa: F401  its classes become names in recipes

PICTURES = 320
"""Of the benchmark, as in the quickstart."""
CACHE = "budget_curve.json"


@dataclass(frozen=True)
class Questions:
    """What a curve is measured on.

    Attributes:
        rows: conversations about pictures.
        what: in words.
        seed: of the rows.
        batch_size: sequences per call.
        learnt: families that the accuracy averages; None for all.
    """

    rows: Rows
    what: str
    seed: int
    batch_size: int
    learnt: tuple[str, ...] | None = None


class BudgetCurve:
    """Measures an export at several budgets; what is measured is kept beside the run, so an interrupted one goes on.

    Args:
        text: the budgets, e.g. `9,16,36` or `0.1,0.25`; a plan of several stages takes `32/8,16/4`.
        console: where progress goes.
        checkpoint: of the run, or its folder; None of a plan that was not trained.

    Raises:
        ValueError: something that is no budget.
    """

    def __init__(self, text: str, console: Console, checkpoint: str | None = None) -> None:
        self.asked, self.console = read_budgets(text), console
        self.cache = None if checkpoint is None else checkpoint_file(checkpoint).parent.parent / CACHE

    def __call__(self, folder: Path, manifest: dict[str, Any]) -> list[CurvePoint]:
        """Measure the export in `folder`.

        Raises:
            ValueError: not one budget per stage, budgets that grow, or no data to measure on.
            KeyboardInterrupt: interrupted; its message says how much is kept.
        """
        plan = PruningPlan.from_dict(manifest["plan"])
        for values in self.asked:
            with_budgets(plan, values)
        questions = questions_of(folder, manifest["trained_with"].get("base"))
        key = {"export": _fingerprint(folder), "data": questions.what, "rows": len(questions.rows)}
        done = self._kept(key)
        model, processor = _placed(load(folder)), load_processor(folder)
        with Progress(console=self.console, transient=True) as progress:
            for values in self.asked:
                name = words(values)
                try:
                    if name not in done:
                        point = _point(model, processor, questions, values, manifest, progress)
                        done[name] = point
                        self._keep(key, done)
                except KeyboardInterrupt as stop:
                    kept = "the same command goes on with them" if self.cache is not None else "nothing is kept"
                    ready = sum(words(each) in done for each in self.asked)
                    raise KeyboardInterrupt(
                        f"Interrupted with {ready} of {len(self.asked)} budgets measured; {kept}."
                    ) from stop
                point = done[name]
                shown = f"{100 * point.accuracy:.1f} % ± {100 * point.ci95:.1f}"
                self.console.print(f"  {name}: {shown}", highlight=False)
        return [done[words(values)] for values in self.asked]

    def _kept(self, key: dict[str, Any]) -> dict[str, CurvePoint]:
        """What an earlier attempt measured of the same export on the same data."""
        if self.cache is None or not self.cache.is_file():
            return {}
        try:
            found = json.loads(self.cache.read_text(encoding="utf-8"))
            return {p["budget"]: CurvePoint(**p) for p in found["points"]} if found["key"] == key else {}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.cache} is damaged ({type(error).__name__}); remove it.") from error

    def _keep(self, key: dict[str, Any], done: dict[str, CurvePoint]) -> None:
        if self.cache is None:
            return
        write_atomic(
            self.cache, json.dumps({"key": key, "points": [p.to_dict() for p in done.values()]}, indent=1) + "\n"
        )


def read_budgets(text: str) -> list[list[Budget]]:
    """Budgets as they are written on a command line: counts, or shares where there is a point.

    Raises:
        ValueError: something that is no budget, or one twice.
    """
    found = [[_budget(word, text) for word in entry.split("/")] for entry in text.replace(" ", "").split(",")]
    if len({words(values) for values in found}) < len(found):
        raise ValueError(f"budgets: '{text}' names one twice; leave it out.")
    return found


def questions_of(folder: Path, base: str | None) -> Questions:
    """The benchmark for a bundled base, else the rows that the run validates on.

    Args:
        folder: of an export, with the recipe of its run.
        base: name of the base model.

    Raises:
        ValueError: another base, and no recipe or no rows to validate on.
    """
    if base is not None and base_path(base) != base:
        rows = list(load_benchmark("test", PICTURES, 0))  # drawn once
        model, processor = _placed(load_base(base)), load_processor(base_path(base))
        dense, blind = (evaluate(model, processor, rows, blank=each) for each in (False, True))
        learnt = tuple(learnt_families(dense, blind))
        return Questions(
            rows, f"the built-in benchmark, families that the base has learnt ({len(learnt)})", 0, 64, learnt
        )
    recipe = read_recipe(folder / "recipe.yaml")
    if recipe is None:
        raise ValueError("budgets are measured on the data of a run, and there is no recipe.yaml; leave --budgets out.")
    data: Any = made(LightningDataModule, recipe.get("data"))
    held_out = None if data is None else data.load_rows()[1]
    if not held_out:
        raise ValueError(
            "The run's data have no rows to validate on; set data val or val_fraction, or leave --budgets out."
        )
    # Listed, as chat data make their columns row by row; pictures in them are not decoded yet.
    return Questions(held_out, "the run's validation rows", data.seed, data.batch_size)


def _point(
    model: Any, processor: Any, questions: Questions, values: list[Budget], manifest: dict[str, Any], progress: Progress
) -> CurvePoint:
    """One budget."""
    left: list[int] = []

    def watch(trace: Trace, _: BatchMeta) -> None:
        left.extend(trace.stages[-1].vision_out if trace.stages else [])

    with budgets(model, values):
        scores = evaluate(
            model, processor, questions.rows, batch_size=questions.batch_size, learnt=questions.learnt,
            progress=progress, watch=watch,
        )  # fmt: skip
    ranges = ranges_of(manifest)
    return CurvePoint(
        budget=words(values),
        retained=sum(left) / max(1, len(left)),
        accuracy=scores.score,
        ci95=scores.ci95,
        token_accuracy=scores.overall("token_accuracy"),
        loss=-scores.overall("log_likelihood"),
        questions=int(scores.count_IF.sum()),
        images=scores.num_images,
        data=questions.what,
        seed=questions.seed,
        trained=None if ranges is None else was_trained(values, ranges, manifest["vision_tokens"]),
    )


def _budget(word: str, text: str) -> Budget:
    try:
        return Budget(keep_ratio=float(word)) if "." in word else Budget(keep_tokens=int(word))
    except ValueError as error:
        reason = f" ({error})" if "keep_" in str(error) else ""
        raise ValueError(
            f"budgets: '{word}' in '{text}' is no count or share{reason}; write 9,16 or 0.1,0.25."
        ) from error


def _fingerprint(folder: Path) -> str:
    """Of weights, config and recipe, by which an export and its data are known again."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("recipe.yaml")]):
        if path.name != "probe.safetensors":
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _placed(model: Any) -> Any:
    """On the accelerator, if there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.eval() if device is None else model.to(device).eval()
