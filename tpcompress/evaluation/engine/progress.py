"""An estimate of the time that the cells to come will take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tpcompress.evaluation.engine.cell import Cell


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
