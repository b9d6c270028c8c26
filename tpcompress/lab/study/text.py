"""A study's tables as Markdown, CSV and JSON, and between the markers of a document."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpcompress.evaluation.scoring.stats import Estimate
from tpcompress.lab.study.config import Study

UNKNOWN = "–"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
HOW = (
    "Percent of questions answered exactly, mean over the families the base has learnt (its accuracy is at least 10 "
    "points above that on blanked images); families marked * it has not, they stand beside the mean and not in it. "
    "± is half a 95 % interval over seeds and images at once: variance over seeds / seeds + bootstrap variance over "
    "images of the seed-averaged answers, Welch-Satterthwaite t. Gains are paired, seed by seed and image by image; "
    "bold where the interval excludes zero. (n) counts seeds where fewer than all are there."
)


@dataclass(frozen=True)
class Table:
    """Rows of cells; a cell is a text or an estimate."""

    name: str
    title: str
    header: list[str]
    rows: list[list[Any]]
    note: str = ""


def to_markdown(study: Study, tables: Sequence[Table], done: int, cells: int) -> str:
    """All tables, and how to read them.

    Args:
        study: what was asked.
        tables: to show.
        done: cells that are there.
        cells: all of them.
    """
    how = f"{done} of {cells} cells, {study.num_images} held-out images, seeds "
    lines = [f"{how}{', '.join(map(str, study.seeds))}. {HOW}", ""]
    for table in tables:
        lines += [f"### {table.title}", "", "| " + " | ".join(table.header) + " |"]
        lines.append("|" + " --- |" * len(table.header))
        lines += ["| " + " | ".join(_text(cell, study) for cell in row) + " |" for row in table.rows]
        lines += ["", *([table.note, ""] if table.note else [])]
    return "\n".join(lines)


def to_csv(tables: Sequence[Table]) -> str:
    """One line per number: table, row, column, mean, half width, seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "half", "seeds"])
    for table, row, column, cell in _numbers(tables):
        writer.writerow([table, row, column, cell.mean, cell.half, cell.seeds])
    return text.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """The same numbers."""
    rows = [
        {"table": table, "row": row, "column": column, "mean": cell.mean, "half": cell.half, "seeds": cell.seeds}
        for table, row, column, cell in _numbers(tables)
    ]
    return json.dumps(rows, indent=1, allow_nan=False)


def _numbers(tables: Sequence[Table]) -> list[tuple[str, str, str, Estimate]]:
    found = []
    for table in tables:
        for row in table.rows:
            names = itertools.takewhile(lambda cell: isinstance(cell, str) and cell != UNKNOWN, row)
            name = " / ".join(names)
            pairs = zip(table.header, row, strict=True)
            found += [(table.name, name, column, cell) for column, cell in pairs if isinstance(cell, Estimate)]
    return found


def fill(text: str, tables: str) -> str:
    """A document with the tables between its markers.

    Raises:
        ValueError: it has no markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The document has no place for the tables; write {BEGIN} and {END} where they belong.")
    return f"{head}{begin}\n\n{tables.strip()}\n\n{end}{tail}"


def _text(cell: Any, study: Study) -> str:
    if not isinstance(cell, Estimate):
        return str(cell)
    sign = "+" if cell.is_gain else ""
    text = f"{100 * cell.mean:{sign}.1f} ± {100 * cell.half:.1f}"
    text = f"**{text}**" if cell.is_gain and cell.clear else text
    return text if cell.seeds == len(study.seeds) else f"{text} ({cell.seeds})"
