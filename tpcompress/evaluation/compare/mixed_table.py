"""One table of our tasks and those of other harnesses, and their differences to the dense row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.evaluation.compare.imported import OTHER, ImportedRow, Key, dense_of
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import ARMS, difference
from tpcompress.evaluation.compare.table import NAMES, tokens, verdict
from tpcompress.evaluation.results import Measured
from tpcompress.evaluation.scoring.metrics import PERCENT, Unit
from tpcompress.evaluation.tables import UNKNOWN, Table, markdown, rich_table, to_json
from tpcompress.files import write_atomic

POINTS = Unit(1.0, "", "points")
MARK = "†"
"""Marks scores of other settings than the first row's."""


@dataclass(frozen=True)
class Entry:
    """A score in the table, whatever its source.

    Attributes:
        score, ci95: in the unit of its column.
        against: difference to the dense row as text; empty without one.
        flips: shares that became wrong and right, as text; empty if not known.
        marked: other settings.
    """

    score: float
    ci95: float | None
    against: str = ""
    flips: str = ""
    marked: bool = False


def mixed_tables(reports: Mapping[str, Report], rows: Sequence[ImportedRow]) -> list[Table]:
    """The table of scores, and that of differences to the dense rows.

    Args:
        reports: our reports, by task.
        rows: rows of other harnesses.
    """
    columns, cells = _own(reports)
    for column, unit in units(rows).items():
        columns[column] = unit
        for row in rows:
            if column in row.measured:
                cells.setdefault(row.key, {})[column] = _entry(rows, row, column, unit)
    titles = {row.key: row.title for row in rows}
    order = (*ARMS, OTHER)
    keys = sorted(cells, key=lambda key: (order.index(key[0]), key[1] or "", -(key[2] or 0)))
    kept = _retained(reports, rows)
    scores, changes = [], []
    for key in keys:
        found, name = cells[key], _name(key, titles.get(key, ""))
        scores.append([name, kept.get(key, ""), *(_cell(found.get(c), unit) for c, unit in columns.items())])
        scores[-1].append(_share_of_dense(found, cells, list(columns)))
        if any(entry.against for entry in found.values()):
            changes.append([name, *(_change(found.get(column)) for column in columns)])
    header = [f"{column} ({unit.title})" for column, unit in columns.items()]
    tables = [Table("Tasks", ["model", "tokens", *header, "% of dense"], [scores], _note(rows))]
    if changes:
        note = (
            "Difference to the dense row with its 95 % interval over paired samples (n.s.: inside it), then shares of "
            "samples that became wrong / right."
        )
        tables.append(Table("Against dense", ["model", *columns], [changes], note))
    return tables


def write_mixed(reports: Mapping[str, Report], rows: Sequence[ImportedRow], folder: Path, console: Console) -> None:
    """Print the tables and write them as `tasks.md`, with all scores as `tasks.json`."""
    tables = mixed_tables(reports, rows)
    for table in tables:
        console.print(rich_table(replace(table, note="")))
        console.print(table.note, highlight=False, soft_wrap=True, markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tasks.md", "\n".join(line for table in tables for line in markdown(table)))
    write_atomic(folder / "tasks.json", to_json(as_records(rows)))
    console.print(f"[bold]{folder}[/bold]: tasks.md, tasks.json", soft_wrap=True)


def units(rows: Sequence[ImportedRow]) -> dict[str, Unit]:
    """Columns in order of appearance, with their unit: shares are written in percent, all others as they are."""
    by_column: dict[str, list[Measured]] = {}
    for row in rows:
        for column, measured in row.measured.items():
            by_column.setdefault(column, []).append(measured)
    return {column: PERCENT if all(map(_is_share, found)) else POINTS for column, found in by_column.items()}


def _is_share(measured: Measured) -> bool:
    values = [measured.score, *measured.samples.values()]
    return all(0 <= value <= 1 for value in values) and measured.scale in (None, 1.0)


def _own(reports: Mapping[str, Report]) -> tuple[dict[str, Unit], dict[Key, dict[str, Entry]]]:
    columns: dict[str, Unit] = {}
    cells: dict[Key, dict[str, Entry]] = {}
    for name, report in reports.items():
        column, unit = f"{name} {report.metric.name}", report.metric.unit
        columns[column] = unit
        dense = next(iter(report.arm("dense")), None)
        for row in report.rows:
            if row.score is None:
                continue
            gain = None if dense is None or row is dense else difference(row, dense.score, dense.ci95)
            flips = "" if row.lost is None or row.gained is None else _flips(row.lost, row.gained)
            against = "" if gain is None else verdict(gain, unit)
            cells.setdefault(row.key, {})[column] = Entry(row.score, row.ci95, against, flips)
    return columns, cells


def _entry(rows: Sequence[ImportedRow], row: ImportedRow, column: str, unit: Unit) -> Entry:
    measured, dense = row.measured[column], dense_of(rows, column)
    marked = column in row.differs
    if dense is None or dense is row or marked:
        return Entry(measured.score, measured.ci95, marked=marked)
    gain, flips = measured.difference(dense.measured[column]), measured.flips(dense.measured[column])
    change = unit.change(measured.score - dense.measured[column].score)
    against = f"{change} (no interval)" if gain is None else verdict(gain, unit)
    return Entry(measured.score, measured.ci95, against, "" if flips is None else _flips(*flips))


def _flips(lost: float, gained: float) -> str:
    return f"{100 * lost:.1f} / {100 * gained:.1f} %"


def _cell(entry: Entry | None, unit: Unit) -> str:
    if entry is None:
        return ""
    interval = "" if entry.ci95 is None else f" ±{unit.number(entry.ci95)}"
    return unit.number(entry.score) + interval + (MARK if entry.marked else "")


def _change(entry: Entry | None) -> str:
    if entry is None or not entry.against:
        return ""
    return entry.against + (f", {entry.flips}" if entry.flips else "")


def _share_of_dense(found: Mapping[str, Entry], cells: Mapping[Key, Mapping[str, Entry]], columns: list[str]) -> str:
    """Mean over the columns of score / score of the dense row; unknown if one is missing, marked or not positive."""
    dense = {column: entry for key, row in cells.items() if key[0] == "dense" for column, entry in row.items()}
    if any(column not in found or column not in dense or found[column].marked for column in columns):
        return UNKNOWN
    if any(dense[column].score <= 0 for column in columns):
        return UNKNOWN
    return f"{100 * sum(found[c].score / dense[c].score for c in columns) / len(columns):.1f}"


def _retained(reports: Mapping[str, Report], rows: Sequence[ImportedRow]) -> dict[Key, str]:
    """Retained vision tokens of every model: one number, or the range over its tasks."""
    found: dict[Key, list[float]] = {}
    for report in reports.values():
        for own in report.rows:
            found.setdefault(own.key, []).extend([] if own.retained_tokens is None else [own.retained_tokens])
    for row in rows:
        counts = [m.retained_tokens for m in row.measured.values() if m.retained_tokens is not None]
        found.setdefault(row.key, []).extend(counts)
    low_high = {key: (min(counts), max(counts)) for key, counts in found.items() if counts}
    return {
        k: tokens(low) if low == high else f"{tokens(low)} to {tokens(high)}" for k, (low, high) in low_high.items()
    }


def _name(key: Key, title: str) -> str:
    arm, pruner, keep, layer, seed = key
    if arm == OTHER:
        return title
    words = [NAMES[arm]] if pruner is None else [NAMES[arm], str(pruner)]
    words += [f"@ layer {layer}"] if layer else []
    budget = "" if keep is None else f", {keep:g}"
    return " ".join(words) + budget + (f" (seed {seed})" if seed else "")


def _note(rows: Sequence[ImportedRow]) -> str:
    note = (
        "tokens: vision tokens of a prompt after pruning. ±: 95 % interval over samples, where the score is their "
        "mean. % of dense: mean over the columns of score / score of the dense row."
    )
    for row in rows:
        for column, settings in row.differs.items():
            note += f" {MARK} {_name(row.key, row.title)}, {column}: other settings than the first row ({settings})."
    return note


def as_records(rows: Sequence[ImportedRow]) -> list[dict[str, Any]]:
    """Plain values of all scores, for JSON."""
    found = []
    for row in rows:
        names = ("arm", "pruner", "keep_tokens", "layer", "seed")
        for measured in row.measured.values():
            dense = dense_of(rows, measured.column)
            same = dense is not None and dense is not row and measured.column not in row.differs
            gain = measured.difference(dense.measured[measured.column]) if same and dense is not None else None
            flips = measured.flips(dense.measured[measured.column]) if same and dense is not None else None
            found.append(
                dict(zip(names, row.key, strict=True))
                | {"title": row.title, "harness": measured.harness, "task": measured.task, "metric": measured.metric}
                | {"score": measured.score, "ci95": measured.ci95, "samples": len(measured.samples) or None}
                | {"vision_tokens": measured.vision_tokens, "retained_tokens": measured.retained_tokens}
                | {"against_dense": gain, "lost": flips and flips[0], "gained": flips and flips[1]}
                | {"other_settings": row.differs.get(measured.column), "source": row.source}
            )
    return found
