"""Which ways to carry a gradient through a choice of tokens were found to teach a scorer, and which were not.

The table is measured by `tpcompress estimators --marks`, on a task that takes seconds: see `evaluation.retrieval`.
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
    """The word for a phase's `full_every`: 0 is gathered, 1 full length, more is mixed."""
    return TRAININGS[min(full_every, 2)]


def mark_of(selector: str, applier: str, full_every: int) -> str:
    """What was found for a selector and an applier in such a phase: learns, does not learn, or unknown.

    Args:
        selector, applier: their names.
        full_every: of the phase.
    """
    return _marks().get((selector, applier, training_of(full_every)), UNKNOWN)


@cache
def _marks() -> dict[tuple[str, str, str], str]:
    """Of entries that differ in arguments alone, one that does not learn speaks for all."""
    marks: dict[tuple[str, str, str], str] = {}
    for entry in json.loads(FILE.read_text()):
        key = entry["selector"], entry["applier"], entry["training"]
        marks[key] = entry["mark"] if marks.get(key, LEARNS) == LEARNS else DOES_NOT_LEARN
    return marks


def write_marks(entries: Sequence[dict[str, Any]], path: Path = FILE) -> None:
    """Write the table, one entry a line.

    Args:
        entries: each with selector, applier, training, mark, and what it was found by.
        path: where to.
    """
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n")
