"""An estimate of the time that the cells to come will take."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tpcompress.errors import counted
from tpcompress.evaluation.engine.cell import Cell, Made
from tpcompress.evaluation.scoring.metrics import Unit
from tpcompress.insertion.budget import amount_text


def report_line(
    name: str,
    made: Made,
    unit: Unit,
    cells: Sequence[Cell],
    records: Mapping[str, Mapping[str, Any] | None],
    runs: Collection[str],
) -> str:
    """What is said of a finished cell.

    Args:
        name: of the cell.
        made: its result.
        unit: of the metric.
        cells: all cells.
        records: records of the finished cells, None of the others.
        runs: names of the training runs that are not finished.
    """
    done = {cell: record for cell, record in records.items() if record is not None}
    left = {run.name for cell in cells if cell.name not in done for run in cell.runs if run.name in runs}
    said = made.record.get("summary", "")
    if made.scores is not None:
        families = " over all families" if len(made.scores.names) > 1 else ""
        said = f"{unit.text(made.scores.score)} ± {unit.number(made.scores.ci95)}{families}"
    rest = "" if len(done) == len(cells) else f"; {duration(seconds_left(cells, done, left))} of one process left"
    if left and all(record.get("train_seconds") is None for record in done.values()):  # no training was timed yet
        rest += f", and {counted(len(left), 'training run')}"
    # Names are those of files, which hold every digit of a ratio.
    shown = re.sub(r"\b0\.\d{5,}", lambda found: amount_text(float(found[0])), name)
    return f"{len(done)}/{len(cells)} {shown}: {said}{rest}"


def duration(seconds: float) -> str:
    """A time that was estimated: `about 12 min`, `less than a minute`, or `an unknown time` for 0."""
    if seconds < 60:
        return "less than a minute" if seconds > 0 else "an unknown time"
    return f"about {seconds / 60:.0f} min"


def seconds_left(cells: Sequence[Cell], done: Mapping[str, Mapping[str, Any]], runs: Collection[str]) -> float:
    """Seconds of the missing cells, from those of their kind that are there.

    Args:
        cells: all cells.
        done: records of the finished cells, by name.
        runs: names of the training runs that are not finished.
    """
    known: dict[str, list[float]] = {}
    for cell in cells:
        record = done.get(cell.name, {})
        for what, kind in (("test_seconds", _tested(cell)), ("train_seconds", _trained(cell))):
            if record.get(what) is not None:
                for name in (f"{what} {kind}", what):
                    known.setdefault(name, []).append(record[what])
    left = [cell for cell in cells if cell.name not in done]
    total = sum(_mean(known, "test_seconds", _tested(cell)) for cell in left)
    new = {run.name: cell for cell in left for run in cell.runs if run.name in runs}
    return total + sum(_mean(known, "train_seconds", _trained(cell)) for cell in new.values())


def _tested(cell: Cell) -> str:
    return str(cell.labels.get("tested") or cell.labels.get("pruner") or cell.labels.get("table"))


def _trained(cell: Cell) -> str:
    return str(cell.labels.get("pruner") or cell.labels.get("row"))


def _mean(known: Mapping[str, list[float]], what: str, kind: str) -> float:
    """Seconds of one kind; of all kinds while that one is unknown; 0 while nothing is known."""
    values = known.get(f"{what} {kind}") or known.get(what) or [0.0]
    return sum(values) / len(values)
