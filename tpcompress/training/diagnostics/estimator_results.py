"""Measured results of gradient estimators: which selectors and appliers train a scorer, and which do not.

The table is written by `tpcompress estimators --marks`, from a toy task that takes seconds (`lab/estimators`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("estimator_results.json")
LEARNS, DOES_NOT_LEARN, UNKNOWN = "learns", "does not learn", "unknown"
TRAININGS = ("gathered", "full length", "mixed")


def training_of(full_every: int) -> str:
    """Name of a phase's `full_every`: 0 is gathered, 1 is full length, more is mixed."""
    return TRAININGS[min(full_every, 2)]


def mark_of(selector: str, applier: str, full_every: int) -> str:
    """Measured result of a selector and an applier: learns, does not learn, or unknown.

    Args:
        selector: name of the selector.
        applier: name of the applier.
        full_every: `full_every` of the phase.
    """
    return _marks().get((selector, applier, training_of(full_every)), UNKNOWN)


@cache
def _marks() -> dict[tuple[str, str, str], str]:
    """Results by selector, applier and training; does not learn if any entry of them (other arguments) does not."""
    marks: dict[tuple[str, str, str], str] = {}
    for entry in json.loads(FILE.read_text()):
        key = entry["selector"], entry["applier"], entry["training"]
        marks[key] = entry["mark"] if marks.get(key, LEARNS) == LEARNS else DOES_NOT_LEARN
    return marks


def write_marks(entries: Sequence[dict[str, Any]], path: Path = FILE) -> None:
    """Write the table, one entry per line.

    Args:
        entries: results with selector, applier, training, mark and measurements.
        path: output file.
    """
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n")
