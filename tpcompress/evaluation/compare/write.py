"""Output of a report: terminal, Markdown, CSV and JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement

from tpcompress.evaluation.compare.findings import findings
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.table import beside_table, layout, position_table
from tpcompress.evaluation.tables import markdown, rich_table, to_csv
from tpcompress.files import write_atomic


def print_report(report: Report, console: Console) -> None:
    """Print the table, in two parts where one is too wide, and the findings."""
    whole = rich_table(layout(report))
    if Measurement.get(console, console.options.update(width=10_000), whole).maximum <= console.width:
        console.print(whole)
    else:
        console.print(rich_table(layout(report, families=False)))
        console.print(rich_table(layout(report, families=True, only_families=True), gap=0))
    beside = beside_table(report)
    if beside is not None:
        console.print(rich_table(beside))
    for sentence in findings(report):
        console.print(f"· {sentence}", markup=False, highlight=False)


def write_report(report: Report, folder: str | Path) -> None:
    """Write report.json, report.csv and report.md, each in one step."""
    texts = {"json": report.to_json(), "csv": report_csv(report), "md": report_markdown(report)}
    for ending, text in texts.items():
        write_atomic(Path(folder) / f"report.{ending}", text)


def report_csv(report: Report) -> str:
    """One line per row; the metric of a family is in column `family:<name>`."""
    lines = []
    for row in report.rows:
        values: dict[str, Any] = asdict(row)
        del values["families"]
        values["learnt"] = values.pop("learnt")  # the last column before the families
        lines.append(values | {f"family:{name}": row.families.get(name) for name in report.families})
    return to_csv(lines) if lines else ""


def report_markdown(report: Report) -> str:
    """Table, findings, positions of retained tokens, settings and notes."""
    lines = markdown(layout(report), level=1)
    lines += ["## Findings", "", *(f"- {sentence}" for sentence in findings(report)), ""]
    for table in (beside_table(report), position_table(report)):
        lines += markdown(table) if table is not None else []
    settings = {key: value for key, value in report.meta.items() if not isinstance(value, dict | list)}
    lines += ["## How", "", *(f"- {key}: {value}" for key, value in settings.items())]
    notes = {row.note: row for row in report.rows if row.note}
    lines += [f"- {' '.join(filter(None, (row.arm, row.pruner)))}: {note}" for note, row in notes.items()]
    return "\n".join(lines) + "\n"
