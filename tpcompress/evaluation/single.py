"""Tests one model: a base, a base with a plan, an export, or a trained run, on a task of the user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from tpcompress.evaluation.engine.counts import Counted
from tpcompress.evaluation.scoring.agreement import calibration
from tpcompress.evaluation.scoring.metrics import find_metric
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.tables import Table, rich_table, to_json
from tpcompress.evaluation.tasks import Task
from tpcompress.export import load
from tpcompress.export import load_processor as export_processor
from tpcompress.export.folder import FORMAT, MANIFEST, read_json
from tpcompress.families import resolve
from tpcompress.files import write_atomic
from tpcompress.insertion.attach import attach, base_of, detach, is_attached, plan_of
from tpcompress.insertion.plan import PruningPlan
from tpcompress.models import load_base, load_processor
from tpcompress.training.checkpoints.load import load_trained


def run_evaluation(
    model: str,
    tasks: Sequence[Task],
    plan: str | None,
    out: str | Path | None,
    console: Console,
    *,
    dense: bool = False,
    blank: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, Scores]:
    """Test a model on tasks and print a table for each.

    Args:
        model: base (folder, hub id, bundled name), export, or folder or checkpoint of a run.
        tasks: what it is tested on.
        plan: plan to attach, which replaces that of an export or run; None leaves it.
        out: folder for `LABEL.json`, `LABEL.npz` and, of generated answers, `LABEL.jsonl`; None writes nothing.
        console: console for progress and table.
        dense: take the plan off.
        blank: replace the images by blank ones.
        dtype: weight dtype.
        device: device.

    Returns:
        scores by title of the task.

    Raises:
        FileNotFoundError, ValueError: no such model or data, or a metric that does not count such answers.
    """
    loaded, processor = load_any(model, dtype, device)
    if (plan is not None or dense) and is_attached(loaded):
        detach(loaded)
    if plan is not None:
        attach(loaded, PruningPlan.of(plan))
    found: dict[str, Scores] = {}
    for number, task in enumerate(tasks):
        title = task.title if task.title not in found else f"{task.title}-{number}"
        counted = Counted()
        with Progress(console=console, transient=True) as progress:
            scores = task.score(loaded, processor, blank=blank, watch=counted.watch, progress=progress)
        found[title] = scores
        table = table_of(loaded, task, scores, counted)
        console.print(rich_table(replace(table, note="")))  # the note is wider than most of these tables
        console.print(table.note, highlight=False, soft_wrap=True)
        if scores.skipped:
            console.print(f"{scores.skipped} of {len(task.rows)} rows were left out as broken.", highlight=False)
        if out is not None:
            _write(Path(out), title, task, scores)
    if out is not None:
        console.print(f"Scores: {out}", highlight=False, soft_wrap=True)
    return found


def load_any(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and processor of a base, an export, or a run; pruned as they are.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    path = Path(model).expanduser()
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        trained: Any = load_trained(path, allow_unfinished=True)
        loaded, processor = trained.model, trained.processor
    elif manifest.get("format") == FORMAT:
        loaded, processor = load(path, dtype=dtype), export_processor(path)
    else:
        loaded, processor = load_base(model, dtype), load_processor(model)
    return loaded.to(torch.device(device)).eval(), processor


def table_of(model: Any, task: Task, scores: Scores, counted: Counted) -> Table:
    """All measured metrics with their intervals, a column each; then the question families, a row each.

    Args:
        model: the tested model.
        task: what it was tested on.
        scores: its answers.
        counted: its vision tokens.
    """
    header, columns = ["questions"], []
    for name in [scores.metric, *(name for name in scores.sums if name != scores.metric)]:
        metric, counted_by = find_metric(name), scores.with_metric(name)
        header.append(f"{name}\n({metric.unit.title})")
        value = f"{metric.unit.number(counted_by.score)} ±{metric.unit.number(counted_by.ci95)}"
        families = [metric.unit.number(number) for number in counted_by.families.values()]
        columns.append([value, *(families if len(families) > 1 else [])])
    first = ["all", *(scores.names if len(scores.names) > 1 else [])]
    rows = [list(line) for line in zip(first, *columns, strict=True)]
    sure = calibration(scores)
    said = "teacher-forced" if task.generation(scores.metric) is None else "generated"
    note = (
        f"{int(scores.count_IF.sum())} questions about {scores.num_images} rows, {said}. ±: 95 % interval over rows. "
    )
    note += f"{scores.left_out_note} " if scores.left_out_note else ""
    note += f"ECE {100 * sure.error:.1f} %, confidence minus accuracy {100 * sure.gap:+.1f} %."
    if is_attached(model):
        retained, average = counted.means(len(resolve(base_of(model)).layers))
        plan = ", ".join(f"{stage.pruner.name}@{stage.layer}" for stage in plan_of(model).stages)
        note += f" Plan {plan}: " + (
            "nothing was pruned."
            if retained is None
            else f"{retained:.1f} vision tokens retained, {average:.1f} a layer, per question with an image."
        )
    return Table(task.description, header, [rows[:1], rows[1:]] if len(rows) > 1 else [rows], note)


def _write(folder: Path, title: str, task: Task, scores: Scores) -> None:
    """The scores, and the answers as JSON lines where they are text."""
    folder.mkdir(parents=True, exist_ok=True)
    scores.save(folder / f"{title}.npz")
    values = {
        name: {"score": counted.score, "ci95": counted.ci95, "families": counted.families}
        for name in scores.sums
        for counted in [scores.with_metric(name)]
    }
    reasons = dict(task.left_out) | ({"broken when used": scores.skipped} if scores.skipped else {})
    known = {
        "task": task.config(), "metric": scores.metric, "rows": scores.num_images,
        "questions": int(scores.count_IF.sum()), "counted": scores.num_counted,
        "skipped": sum(reasons.values()), "skipped_reasons": reasons,
    }  # fmt: skip
    write_atomic(folder / f"{title}.json", to_json(known | {"metrics": values}))
    asked = scores.questions
    if asked is not None and task.generation(scores.metric) is not None:
        lines = [
            {"row": int(row), "family": scores.names[family], "answer": str(answer), "right": bool(right)}
            for row, family, answer, right in zip(
                asked.image_Q, asked.family_Q, asked.answer_Q, asked.right_Q, strict=True
            )
        ]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        write_atomic(folder / f"{title}.jsonl", text + "\n")
