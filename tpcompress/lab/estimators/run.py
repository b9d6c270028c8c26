"""Runs an estimator table: makes its cells on the bench and writes its report and marks."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.scoring.metrics import find_metric
from tpcompress.lab.estimators.cells import BLIND, DENSE, FREE, cells_of
from tpcompress.lab.estimators.config import EstimatorTable
from tpcompress.lab.estimators.report import EstimatorReport
from tpcompress.lab.estimators.write import print_report, write_report
from tpcompress.training.diagnostics.estimator_results import write_marks


def run_estimators(config: str, out: str | None, marks: str | None, console: Console) -> EstimatorReport:
    """Measure what is missing, print the tables and write report.json, .csv and .md.

    Args:
        config: a file of estimators.
        out: output directory; default: the file's own.
        marks: file for the marks of the toy task; None leaves them in the report.
        console: console for progress and tables.

    Raises:
        FileNotFoundError, ValueError: a mistake in the file, or an output directory of other settings.
        KeyboardInterrupt: interrupted; what is finished is kept.
    """
    table = EstimatorTable.from_file(config)
    cells, folder = cells_of(table), Path(out or table.out)
    metric = table.metric or ""
    bench = Bench(table.base, table.make_task(), folder, console, metric, table.batch_size, many_runs=True)
    bench.work(cells)
    without = {cell.labels["row"]: cell for cell in cells if cell.labels["table"] == FREE and not cell.labels["keep"]}
    learnt = bench.learnt(without[DENSE], without[BLIND]) if without else None
    answers = {cell.name: bench.scores(cell) for cell in cells if cell.on_model}
    kept = {name: scores.with_learnt(learnt) for name, scores in answers.items() if scores is not None}
    found = [record for cell in cells if (record := bench.record(cell)) and cell.labels["row"] != BLIND]
    meta = {
        name: getattr(table, name) for name in ("base", "num_images", "trained_at", "seeds", "base_seeds", "recipe")
    }
    report = EstimatorReport(found, kept, meta | {"metric": bench.metric}, find_metric(bench.metric).unit)
    print_report(report, console)
    write_report(report, folder)
    if marks is not None:
        write_marks(report.marks(), Path(marks))
    console.print(f"[bold]{folder}[/bold]: report.json, report.csv, report.md", soft_wrap=True)
    return report
