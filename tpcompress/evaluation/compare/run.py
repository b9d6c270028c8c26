"""Runs a comparison: makes its cells on the bench, turns them into rows, and writes report and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.evaluation.compare.accuracy_figure import accuracy_figure
from tpcompress.evaluation.compare.beside import beside_score
from tpcompress.evaluation.compare.cells import DegradedCell, RowCell, cells_of
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.imported import import_rows
from tpcompress.evaluation.compare.mixed_table import write_mixed
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.compare.table import tasks_table
from tpcompress.evaluation.compare.write import print_report, report_markdown, write_report
from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.cell import Cell, slug
from tpcompress.evaluation.engine.plans import control_plan
from tpcompress.evaluation.figures.position_bias import bias_figure
from tpcompress.evaluation.figures.retained import retained_figure, retained_masks
from tpcompress.evaluation.position_bias import RetentionMap
from tpcompress.evaluation.scoring.agreement import HardSubset
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.tables import markdown, rich_table
from tpcompress.files import write_atomic
from tpcompress.inference import default_device

SAMPLES = 4
"""Sample images of the figure of retained tokens."""


def run_comparison(
    config: str | Comparison, out: str | Path | None, console: Console, **changes: Any
) -> Report | dict[str, Report]:
    """Make every row that the output directory lacks, print the table and write report and figures.

    Args:
        config: a comparison, or its file.
        out: output directory; default: the comparison's.
        console: console for progress and table.
        changes: keys of the comparison that replace those of the file, such as `data` and `base`.

    Returns:
        the report; of several `tasks`, the reports by task; none of a file with nothing but `results`.

    Raises:
        FileNotFoundError, ValueError: a mistake in the file, an export as base, or an output directory of other
            settings; or a cell could not be made, after the table of the others is printed.
        KeyboardInterrupt: interrupted; what is finished is kept.
    """
    comparison = Comparison.from_file(config) if isinstance(config, str) else config
    comparison = replace(comparison, **changes)
    imported = import_rows(comparison.results)  # before anything is trained: mistakes in files are found here
    if comparison.only_results:
        write_mixed({}, imported, Path(out or comparison.out), console)
        return {}
    if not comparison.tasks:
        run = ComparisonRun.open(comparison, out, console)
        report = _finished(run)
        if imported:
            write_mixed({slug(run.bench.task.title): report}, imported, run.bench.folder, console)
        return report
    folder, reports, first = Path(out or comparison.out), dict[str, Report](), None
    for name, one in comparison.by_task().items():
        console.print(f"[bold]{name}[/bold]", highlight=False)
        run = ComparisonRun.open(one, folder / name, console)
        run.bench.runs = folder / "train"
        if first is not None:
            run.bench.share(first)
        first = first or run.bench
        reports[name] = _finished(run)
    table = tasks_table(reports)
    console.print(rich_table(table))
    whole = [
        *markdown(table, level=1),
        *(line for n, r in reports.items() for line in (f"# {n}", "", report_markdown(r))),
    ]
    write_atomic(folder / "report.md", "\n".join(whole))
    if imported:
        write_mixed(reports, imported, folder, console)
    console.print(f"[bold]{folder}[/bold]: report.md, {', '.join(f'{name}/' for name in reports)}", soft_wrap=True)
    return reports


def _finished(run: ComparisonRun) -> Report:
    """Make all rows; where one cannot be made, the table of the others is still printed."""
    try:
        run.work()
    except ValueError:
        run.update()
        if run.report.rows:
            run.finish()
        raise
    return run.finish()


@dataclass
class ComparisonRun:
    """A comparison in progress.

    Attributes:
        bench: base model, data and results.
        cells: all cells of the comparison.
        report: rows of the finished cells.
    """

    bench: Bench
    cells: Sequence[Cell]
    report: Report
    answers: dict[str, Scores] = field(default_factory=dict)

    @classmethod
    def open(cls, config: str | Comparison, out: str | Path | None, console: Console) -> ComparisonRun:
        """Read the file and check it."""
        comparison = Comparison.from_file(config) if isinstance(config, str) else config
        cells, task = cells_of(comparison), comparison.make_task()
        folder = Path(out or comparison.out)
        metric, device = comparison.metric or "", default_device()
        bench = Bench(comparison.base, task, folder, console, metric, comparison.batch_size, device=device)
        settings = {name: value for name, value in task.config().items() if name not in ("type", "generate")}
        generation = task.generation(bench.metric)
        how = "teacher-forced" if generation is None else f"generated, {generation}"
        meta = {"base": comparison.base, "task": task.description, "metric": bench.metric, "answers": how, **settings}
        return cls(bench, cells, Report(meta=meta))

    def work(self) -> None:
        """Make the missing cells; the report is written after each of them."""
        self.bench.work(self.cells, lambda cell: self.update())
        self.update()

    def update(self) -> None:
        """Build the rows of the finished cells and write the report."""
        dense, blind = self.cells[:2]
        learnt, blanked = self.bench.learnt(dense, blind), self.bench.scores(blind)
        if learnt is None or blanked is None:
            return
        averaged = learnt or list(blanked.names)  # without a learnt family there is a table all the same, marked
        self.report.meta |= {"learnt": learnt, "blind": blanked.families, "skipped rows": self._skipped(blanked)}
        answers = self.bench.scores(dense)
        if answers is not None and answers.left_out_note:
            self.report.meta["counted"] = answers.left_out_note
        self.report.rows = []
        hard = self._hard(averaged)
        if hard is not None and hard.size:
            degraded = hard.degraded
            self.report.meta["hard"] = {"questions": hard.size, "score": degraded.score, "ci95": degraded.ci95}
        for cell in self.cells:
            if cell is blind or isinstance(cell, DegradedCell) or (record := self.bench.record(cell)) is None:
                continue
            known = {name: record[name] for name in Row.RECORDED if name in record}
            if self.bench.scores(cell) is None:  # smaller images of a family that has none
                self.report.add(Row(**cell.labels, **known, learnt=learnt))
                continue
            scores = self._answers(cell, averaged)
            if cell.runs:
                known["seconds"] = record["train_seconds"]
            beside = beside_score(
                scores, None if cell is dense else self._answers(dense, averaged), hard, cell.labels["arm"]
            )
            row = Row.of(scores, **cell.labels, **known, **beside, learnt=learnt)
            self.report.add(self._paired(row, cell, scores) if row.arm == "training_aware" else row)
        write_report(self.report, self.bench.folder)

    def finish(self) -> Report:
        """Print the table, write report and figures."""
        folder, console = self.bench.folder, self.bench.console
        write_report(self.report, folder)
        print_report(self.report, console)
        files = ["report.json", "report.csv", "report.md"]
        if any(row.score is not None for row in self.report.rows):
            accuracy_figure(self.report, folder / "accuracy.png")
            files.append("accuracy.png")
        shown = self._shown()
        rows = self._samples()
        if shown and rows:
            masks = {}
            for name, cell in shown.items():
                with cell.model(self.bench) as model:
                    masks[name] = retained_masks(model, self.bench.processor, rows)
            retained_figure(masks, folder / "retained.png")
            files.append("retained.png")
        paths = {name: cell.map_path(self.bench) for name, cell in shown.items()}
        maps = {name: RetentionMap.load(path) for name, path in paths.items() if path.is_file()}
        if maps:
            bias_figure(maps, folder / "position_bias.png")
            files.append("position_bias.png")
        console.print(f"[bold]{folder}[/bold]: {', '.join(files)}", soft_wrap=True)
        return self.report

    def run_folder(self, row: Row) -> Path:
        """Folder of the training run of a row."""
        cell = next(cell for cell in self.cells if cell.runs and Row(**cell.labels).key == row.key)
        return self.bench.run_folder(cell.runs[0])

    # ------------------------------------------------------------------ inside

    def _skipped(self, scores: Scores) -> int:
        """Rows left out by the reader and in the test."""
        _ = self.bench.task.rows  # the reader counts when they are loaded
        return sum(self.bench.task.left_out.values()) + scores.skipped

    def _hard(self, averaged: Sequence[str]) -> HardSubset | None:
        """The hard subset, once the base was tested on both kinds of degraded images."""
        halves = [cell for cell in self.cells if isinstance(cell, DegradedCell)]
        if not halves or any(self.bench.record(cell) is None for cell in halves):
            return None
        first, second = (self._answers(cell, averaged) for cell in halves)
        return HardSubset(first, second)

    def _answers(self, cell: Cell, learnt: Sequence[str]) -> Scores:
        """Answers of a finished cell, averaged over the learnt families; kept, as their bootstrap is."""
        if cell.name not in self.answers:
            found = self.bench.scores(cell)
            assert found is not None
            self.answers[cell.name] = found.with_learnt(learnt)
        return self.answers[cell.name]

    def _paired(self, row: Row, cell: Cell, scores: Scores) -> Row:
        """A trained row with its paired differences to the same pruner without training and to the control."""
        free = self.report.twin(row, "training_free")
        row = row if free is None else replace(row, gain=scores.difference(self._of(free)))
        assert isinstance(cell, RowCell)
        assert cell.plan is not None
        control = control_plan(cell.plan)
        start = None if control is None else control.stages[-1].pruner.name
        same = self.report.find("dense_ft", start, row.keep_tokens, row.layer, 0)
        if start is None or same is None:
            return row
        note = "" if start == row.pruner else f"its control is {start}, which it equals before training"
        gain = scores.difference(self._of(same))
        return replace(row, control_score=same.score, control_gain=gain, note=note)

    def _of(self, row: Row) -> Scores:
        """Answers of a row that is in the report."""
        wanted = [cell for cell in self.cells if cell.labels["arm"] == row.arm and Row(**cell.labels).key == row.key]
        return self.answers[wanted[0].name]

    def _shown(self) -> dict[str, RowCell]:
        """The cells of the figures: every pruner at its first budget, untrained and trained."""
        shown: dict[str, RowCell] = {}
        for cell in self.cells:
            if isinstance(cell, RowCell) and cell.plan is not None and cell.labels["arm"] != "dense_ft":
                trained = ", trained" if cell.runs else ""
                shown.setdefault(f"{cell.labels['pruner']}{trained}", cell)
        return shown

    def _samples(self) -> list[dict]:
        """The first rows with an image."""
        found: list[dict] = []
        for index in range(len(self.bench.task.rows)):
            if len(found) == SAMPLES:
                break
            row = self.bench.task.rows[index]
            found += [row] if row["images"] else []
        return found
