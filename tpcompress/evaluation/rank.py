"""Ranks all untrained rules on rows of the user: score with interval, cost, and a contact sheet of retained tokens.

run_rank("tiny_llava", None, [16, 36], "runs/rank", console).best("16")

Results are cells of a `Bench`, one per rule and budget, so that an interrupted ranking resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tpcompress.bundled import base_path
from tpcompress.data.collate import BatchMeta
from tpcompress.errors import first_line
from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.cell import Made, slug
from tpcompress.evaluation.engine.model_cell import ModelCell
from tpcompress.evaluation.figures.contact_sheet import contact_sheet
from tpcompress.evaluation.figures.retained import Retained, retained_masks
from tpcompress.evaluation.rank_cost import CostCell, attached, prompts_of
from tpcompress.evaluation.rank_report import Ranking, RankRow, write_ranking
from tpcompress.evaluation.rank_rules import Refusal, Rule, read_budgets, rules_for
from tpcompress.evaluation.tasks import Task, create_task
from tpcompress.export.runtimes import not_servable
from tpcompress.families import resolve
from tpcompress.inference import default_device, inference, inputs_for
from tpcompress.insertion.attach import is_attached, record
from tpcompress.insertion.budget import Budget
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.trace import Trace

IMAGES = 64
"""Default number of rows."""
SAMPLES = 4
"""Images of the contact sheet."""


def run_rank(
    model: str,
    data: Task | str | dict[str, Any] | None,
    budgets: str | Sequence[Budget | float | str],
    out: str | Path,
    console: Console,
    *,
    rules: Sequence[str] | None = None,
    image_folder: str | None = None,
    num_images: int = IMAGES,
    metric: str | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str | None = None,
    servable: bool = False,
) -> Ranking:
    """Score every untrained rule at every budget, print the table, and write it with a contact sheet.

    Args:
        model: base model: folder, hub id or bundled name.
        data: chat data of any format that training takes, a task or its mapping; None for the built-in benchmark
            (bundled base only).
        budgets: counts, ratios or fractions per image: `32,64`, `[0.25]`, `1/9`.
        out: output folder; a ranking in it with the same settings is resumed.
        console: console for progress and table.
        rules: names of pruners; None for all that run without training.
        image_folder: folder that relative image paths of `data` start from.
        num_images: rows to use, from the first; ignored for a task that is given.
        metric: metric of the score; default: that of the task.
        batch_size: sequences per call.
        dtype: dtype of the model's weights.
        device: device; default: the accelerator if there is one.
        servable: rank only rules that a serving engine can run.

    Raises:
        FileNotFoundError, ValueError: an argument is invalid, a file is missing, a budget prunes nothing on these rows,
            or `out` holds other results.
        KeyboardInterrupt: interrupted; finished cells are kept.
    """
    run = RankRun.open(
        model, _task(model, data, image_folder, num_images), read_budgets(budgets), Path(out), console, rules, metric,
        batch_size, dtype, device, servable,
    )  # fmt: skip
    return run.finish()


@dataclass(frozen=True, eq=False)
class RankCell(ModelCell):
    """One rule at one budget, with the number of vision tokens that it retains; or the reason why it does not run."""

    def make(self, bench: Bench) -> Made:
        """Test the rule. A rule that refuses these rows is a result too."""
        counts: list[tuple[int, int]] = []

        def watch(trace: Trace, meta: BatchMeta) -> None:
            counts.extend(_per_prompt(trace))

        try:
            with self.model(bench) as model:
                scores = bench.test(model, self.blank, watch)
        except ValueError as error:
            if self.plan is None:
                raise
            reason = first_line(error)
            return Made({"refused": reason, "summary": f"does not run: {reason}"})
        total, kept = (float(np.mean(x)) for x in zip(*counts, strict=True)) if counts else (None, None)
        return Made({"vision_tokens": total, "retained_tokens": kept}, scores)


@dataclass
class RankRun:
    """A ranking in progress.

    Attributes:
        bench: base model, data and results.
        budgets: by label.
        rules: the rules that run on this model.
        refused: the others.
        cells: by rule and label of the budget.
    """

    bench: Bench
    budgets: Mapping[str, Budget]
    rules: Sequence[Rule]
    refused: list[Refusal]
    cells: dict[tuple[Rule, str], RankCell]
    dense: RankCell = field(default_factory=lambda: RankCell("dense", {"pruner": "dense"}))
    blind: RankCell = field(default_factory=lambda: RankCell("blind", {"pruner": "dense, no images"}, blank=True))

    @classmethod
    def open(
        cls,
        model: str,
        task: Task,
        budgets: Mapping[str, Budget],
        out: Path,
        console: Console,
        names: Sequence[str] | None,
        metric: str | None,
        batch_size: int,
        dtype: str,
        device: str | None,
        servable: bool,
    ) -> RankRun:
        """Load the model and choose the rules and their layers; nothing is measured yet."""
        bench = Bench(
            model, task, out, console, metric or "", batch_size, dtype=dtype, device=device or default_device()
        )
        if is_attached(bench.model):
            raise ValueError(f"{model} is an export, which has a plan; rank its base model.")
        rules, refused = rules_for(resolve(bench.model), names, servable)
        cells = {}
        for label, budget in budgets.items():
            for rule in rules:
                labels = {"pruner": rule.name, "layer": rule.layer, "budget": label}
                keep = budget.keep_tokens if budget.keep_ratio is None else budget.keep_ratio
                name = slug(f"{rule.name}-l{rule.layer}-{keep}")
                cells[rule, label] = RankCell(name, labels, rule.plan(budget))
        run = cls(bench, budgets, rules, refused, cells)
        run.check_budgets()
        return run

    @property
    def cost(self) -> CostCell:
        """The cell that times all plans in turns."""
        return CostCell("cost", {"table": "cost"}, {cell.name: cell.plan for cell in self.cells.values() if cell.plan})

    def check_budgets(self) -> None:
        """Refuse a budget at which nothing is pruned, before hours of measuring the dense model.

        Raises:
            ValueError: the budget keeps every token of the first rows with images, or no row has one.
        """
        prompts = prompts_of(self.bench.processor, self.bench.task.rows, SAMPLES)
        for label, budget in self.budgets.items():
            plan, most = PruningPlan([Stage("uniform", 0, budget.keep_ratio, budget.keep_tokens)]), 0
            for prompt in prompts:
                with attached(self.bench.model, plan), inference(self.bench.model), record(self.bench.model) as trace:
                    self.bench.model(**inputs_for(self.bench.model, prompt), use_cache=False)
                stages = [s for s in trace.stages if s.vision_in != s.vision_out]
                if stages:
                    break
                most = max([most, *(count for s in trace.stages for count in s.total)])
            else:
                raise ValueError(
                    f"Budget {label} prunes nothing: the images (or tiles) of the first {len(prompts)} rows with "
                    f"images have at most {most} vision tokens, and the budget holds for each; give a smaller one."
                )

    def finish(self) -> Ranking:
        """Make the missing cells, then print the table and write all files."""
        cells = [self.dense, self.blind, *self.cells.values(), self.cost]
        self.bench.work(cells)
        ranking = self.ranking()
        ranking.print(self.bench.console)
        figure = self.bench.folder / "retained.png"
        sheet = self._sheet(ranking)
        if sheet:
            contact_sheet(sheet, figure)
        write_ranking(ranking, self.bench.folder)
        files = ["rank.md", "rank.json", *(["retained.png"] if sheet else [])]
        self.bench.console.print(f"[bold]{self.bench.folder}[/bold]: {', '.join(files)}", soft_wrap=True)
        return ranking

    def ranking(self) -> Ranking:
        """The table of the finished cells."""
        bench = self.bench
        dense, blind = bench.scores(self.dense), bench.scores(self.blind)
        assert dense is not None and blind is not None
        learnt = bench.learnt(self.dense, self.blind) or None
        dense, blind = dense.with_learnt(learnt), blind.with_learnt(learnt)
        measured = bench.record(self.cost) or {}
        depth = bench.model.config.get_text_config().num_hidden_layers
        rows, refused = [], list(self.refused)
        for (rule, label), cell in self.cells.items():
            found = bench.record(cell) or {}
            if "refused" in found:
                refused.append(Refusal(rule.name, found["refused"], label))
                continue
            answers = bench.scores(cell)
            assert answers is not None and cell.plan is not None
            answers = answers.with_learnt(learnt)
            rows.append(
                RankRow(
                    rule=rule.name, layer=rule.layer, budget=label, plan=cell.plan, score=answers.score,
                    ci95=answers.ci95, gain=answers.difference(dense), vision_tokens=found["vision_tokens"],
                    retained_tokens=found["retained_tokens"], layer_average=_layer_average(rule.layer, found, depth),
                    cost=measured.get("costs", {}).get(cell.name),
                    served=not_servable(cell.plan, bench.model.config) is None,
                )
            )  # fmt: skip
        return Ranking(
            rows, refused, list(self.budgets), bench.base, bench.task.description, bench.metric, dense.score,
            dense.ci95, blind.score, dense.num_images, learnt, measured.get("on", ""), bench.folder,
            dense.left_out_note,
        )  # fmt: skip

    def _sheet(self, ranking: Ranking) -> dict[str, dict[str, list[Retained]]]:
        """Retained tokens of the first images, by budget and rule, in the order of the ranking."""
        rows, sheet = self._samples(), {}
        for label in ranking.budgets if rows else ():
            column = {}
            for row in ranking.at(label):
                with attached(self.bench.model, row.plan):
                    masks = retained_masks(self.bench.model, self.bench.processor, rows)
                column[f"{row.rule}, layer {row.layer}\n{ranking.unit.text(row.score)}"] = masks
            if column:
                sheet[f"Budget {label}, best rule first"] = column
        return sheet

    def _samples(self) -> list[dict[str, Any]]:
        """The first rows with an image."""
        found: list[dict[str, Any]] = []
        for index in range(len(self.bench.task.rows)):
            if len(found) == SAMPLES:
                break
            row = self.bench.task.rows[index]
            found += [dict(row)] if row["images"] else []
        return found


def _task(model: str, data: Task | str | dict[str, Any] | None, image_folder: str | None, num_images: int) -> Task:
    """The task of the data: chat data if it is a path, the benchmark without any."""
    if isinstance(data, Task | dict):
        return create_task(data)
    if data is None or data == "benchmark":
        if base_path(model) == model and data is None:
            raise ValueError(f"rank requires data for {model}: chat data such as a LLaVA JSON file.")
        return create_task({"type": "benchmark", "num_images": num_images})
    return create_task({"type": "chat", "data": data, "image_folder": image_folder, "num_images": num_images})


def _per_prompt(trace: Trace) -> list[tuple[int, int]]:
    """Vision tokens of each prompt of a batch, before the first stage and after the last."""
    if not trace.stages:
        return []
    last, sums = trace.stages[-1], dict[int, tuple[int, int]]()
    for owner, total, kept in zip(last.owner, last.total, last.vision_out, strict=True):
        before, after = sums.get(owner, (0, 0))
        sums[owner] = (before + total, after + kept)
    return list(sums.values())


def _layer_average(layer: int, found: Mapping[str, Any], depth: int) -> float | None:
    """Vision tokens averaged over the decoder layers, with one stage."""
    total, retained = found["vision_tokens"], found["retained_tokens"]
    return None if total is None else (layer * total + (depth - layer) * retained) / depth
