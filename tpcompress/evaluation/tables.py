"""Writes tables and records: Markdown, the terminal, CSV and JSON, for comparisons, studies and estimator tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich import table as rich_tables

UNKNOWN = "–"


@dataclass(frozen=True)
class Table:
    """A table of cells; what a cell is, is up to the function that shows it.

    Attributes:
        title: heading.
        header: name of every column.
        sections: groups of rows.
        note: text below.
        name: short name for files.
    """

    title: str
    header: list[str]
    sections: list[list[list[Any]]]
    note: str = ""
    name: str = ""

    @property
    def rows(self) -> list[list[Any]]:
        """The rows of all sections."""
        return [row for section in self.sections for row in section]


def markdown(table: Table, level: int = 2, show: Callable[[Any], str] = str) -> list[str]:
    """Lines of Markdown: heading, table, note.

    Args:
        table: to write.
        level: of the heading.
        show: text of a cell.
    """
    lines = [f"{'#' * level} {table.title}", "", "| " + " | ".join(table.header) + " |"]
    lines.append("| --- |" + " ---: |" * (len(table.header) - 1))
    lines += ["| " + " | ".join(map(show, row)) + " |" for row in table.rows]
    return [*lines, "", *([table.note, ""] if table.note else [])]


def rich_table(table: Table, gap: int = 1, show: Callable[[Any], str] = str) -> rich_tables.Table:
    """The table for the terminal, with a line after each section.

    Args:
        table: to show.
        gap: blanks between columns.
        show: text of a cell.
    """
    made = rich_tables.Table(
        title=table.title, caption=table.note, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, padding=(0, gap, 0, 0),
    )  # fmt: skip
    for number, name in enumerate(table.header):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for section in table.sections:
        for row in section:
            made.add_row(*map(show, row))
        made.add_section()
    return made


def to_csv(records: Sequence[Mapping[str, Any]], header: Sequence[str] = ()) -> str:
    """One line per record; a list becomes its entries with blanks between.

    Args:
        records: plain values by column.
        header: columns; default: those of the first record.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(header or records[0]), lineterminator="\n", restval="")
    writer.writeheader()
    for record in records:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in record.items()})
    return text.getvalue()


def to_json(value: Any) -> str:
    """JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
