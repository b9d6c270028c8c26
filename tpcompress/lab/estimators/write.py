"""Output of an estimator report: terminal, Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.evaluation.scoring.metrics import PERCENT
from tpcompress.evaluation.tables import UNKNOWN, Table, markdown, rich_table, to_csv, to_json
from tpcompress.files import write_atomic
from tpcompress.lab.estimators.catalogue import find_estimator
from tpcompress.lab.estimators.cells import BASE, BLIND, DENSE, FREE, TOY
from tpcompress.lab.estimators.report import EstimatorReport, Line


def tables_of(report: EstimatorReport) -> list[Table]:
    """The toy task, the base, and pruners without training, as text."""
    made = []
    steps = list(dict.fromkeys(line.step for line in report.of(TOY)))
    if steps:
        header = ["estimator", "selector", "applier", "training", "losses"]
        header += [f"{what} @{step}" for step in steps for what in ("right", "recall")] + ["worst", "mark"]
        made.append(Table("Toy task, percent", header, [[*_toy_rows(report, steps)]]))
    columns = list(dict.fromkeys((line.column, line.keep) for line in report.of(BASE)))
    if columns:
        header = ["estimator", *(f"{column} @{keep}" for column, keep in columns)]
        rows = [
            [row, *(_score(report, BASE, row, column, keep) for column, keep in columns)]
            for row in dict.fromkeys(line.row for line in report.of(BASE))
        ]
        made.append(Table(f"On the base, scorer alone, {report.unit.title}", header, [rows]))
    keeps = list(dict.fromkeys(line.keep for line in report.of(FREE) if line.keep))
    if keeps:
        names = [name for name in dict.fromkeys(line.row for line in report.of(FREE)) if name != BLIND]
        rows = [
            [name, *(_score(report, FREE, name, "", 0 if name == DENSE else keep) for keep in keeps)] for name in names
        ]
        made.append(
            Table(f"Without training, {report.unit.title}", ["pruner", *(f"@{keep}" for keep in keeps)], [rows])
        )
    return made


def print_report(report: EstimatorReport, console: Console) -> None:
    """Print tables and findings."""
    for table in tables_of(report):
        console.print(rich_table(table))
    for sentence in report.findings():
        console.print(f"· {sentence}", markup=False, highlight=False)


def report_markdown(report: EstimatorReport) -> str:
    """Tables, findings and settings."""
    lines = ["# Estimators", ""]
    for table in tables_of(report):
        lines += markdown(table)
    lines += ["Toy task: means over seeds, `worst` is the lowest share of a seed. Base: means over seeds, ± is the"]
    lines += ["95 % interval over images, all questions of an image together.", "", "## Findings", ""]
    lines += [f"- {sentence}" for sentence in report.findings()] + ["", "## How", ""]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in report.meta.items())]) + "\n"


def write_report(report: EstimatorReport, folder: Path) -> None:
    """Write report.json, report.csv and report.md, each in one step."""
    lines = [vars(line) for line in report.lines]
    values = {"lines": lines, "marks": report.marks(), "findings": report.findings(), "meta": report.meta}
    write_atomic(folder / "report.json", to_json(values))
    write_atomic(folder / "report.csv", to_csv(lines, list(vars(Line("", "")))))
    write_atomic(folder / "report.md", report_markdown(report))


def _toy_rows(report: EstimatorReport, steps: Sequence[int]) -> Iterator[list[str]]:
    for entry in report.marks():
        estimator = find_estimator(entry["estimator"])
        named = [_short(estimator.selector), _short(estimator.applier), estimator.training]
        losses = ", ".join(config["class_path"] for config in estimator.losses) or UNKNOWN
        lines = [report.by_place[TOY, estimator.name, "", 0, step] for step in steps]
        values = [PERCENT.number(value) for line in lines for value in (line.score, line.recall)]
        yield [estimator.name, *named, losses, *values, PERCENT.number(lines[-1].worst), entry["mark"]]


def _score(report: EstimatorReport, table: str, row: str, column: str, keep: int) -> str:
    line = report.by_place.get((table, row, column, keep, 0))
    return UNKNOWN if line is None else f"{report.unit.number(line.score)} ± {report.unit.number(line.ci95)}"


def _short(config: Any) -> str:
    arguments = [str(value) for key, value in config.items() if key != "type"]
    return " ".join([config["type"], *arguments])
