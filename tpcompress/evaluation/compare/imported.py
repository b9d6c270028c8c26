"""Rows of other evaluation harnesses in a comparison: entries of `results`, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tpcompress.bundled import recipes_folder
from tpcompress.errors import read_yaml
from tpcompress.evaluation.compare.row import ARMS
from tpcompress.evaluation.results import Measured, find_reader, list_readers

Key = tuple[str, str | None, float | None, int, int]
"""Arm, pruner, budget, layer and seed: as `Row.key`."""

OWN = ("arm", "pruner", "keep_tokens", "layer", "seed", "label")
"""Keys of an entry that replace what the file says of its model."""
OTHER = "other"
"""Arm of a model that is none of ours."""


@dataclass(frozen=True, eq=False)
class ImportedRow:
    """Scores of one model.

    Attributes:
        key: its place in the table: rows of equal keys are one model.
        title: name of a model that is none of ours.
        measured: its scores, by column.
        source: file or files.
        differs: by column, settings in which it differs from the first row.
    """

    key: Key
    title: str
    measured: Mapping[str, Measured]
    source: str
    differs: Mapping[str, str] = field(default_factory=dict)


def check_entry(entry: Any) -> str:
    """The harness of an entry of `results`.

    Raises:
        ValueError: not a mapping with one harness, or an unknown key or arm.
    """
    known = ", ".join(list_readers())
    if not isinstance(entry, Mapping):
        raise ValueError(f"results: an entry is a mapping such as lmms_eval: FILE, got {entry!r}.")
    harness = [str(key) for key in entry if key in list_readers()]
    if len(harness) != 1:
        raise ValueError(f"results: an entry has one of the keys {known}, got {', '.join(map(str, entry))}.")
    if entry.get("arm") not in (None, *ARMS):
        raise ValueError(f"results: no arm '{entry['arm']}'; choose one of {', '.join(ARMS)}.")
    return harness[0]


def import_rows(entries: Sequence[Mapping[str, Any]]) -> list[ImportedRow]:
    """Read all entries; those of one model become one row.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read, two files with the same score of one model, or rows
            with other samples.
    """
    rows: dict[Key, ImportedRow] = {}
    for entry in entries:
        harness = check_entry(entry)
        path = Path(str(entry[harness])).expanduser()
        options = {key: value for key, value in entry.items() if key not in (harness, *OWN)}
        model, found = find_reader(harness).read(path, **options)
        if "metrics" not in entry:
            found = _reported(found)
        title = str(entry.get("label") or model.title)
        arm = entry.get("arm") or model.arm or OTHER
        key = (
            arm,
            entry.get("pruner", entry.get("label") if model.pruner and "label" in entry else model.pruner),
            entry.get("keep_tokens", model.keep_tokens),
            entry.get("layer", model.layer),
            entry.get("seed", 0),
        )
        key = (OTHER, title, None, 0, 0) if arm == OTHER else key
        before = rows.get(key)
        columns = {} if before is None else dict(before.measured)
        for measured in found:
            if measured.column in columns:
                assert before is not None
                raise ValueError(
                    f"{path} and {before.source} both have {measured.column} of the same model; give one of them a "
                    f"label, a seed, or an arm."
                )
            columns[measured.column] = measured
        source = str(path) if before is None else f"{before.source}, {path}"
        rows[key] = ImportedRow(key, title, columns, source)
    return _checked(list(rows.values()))


def dense_of(rows: Sequence[ImportedRow], column: str) -> ImportedRow | None:
    """The dense row with a column."""
    return next((row for row in rows if row.key[0] == "dense" and column in row.measured), None)


@cache
def reported_metrics() -> dict[str, list[str]]:
    """Metrics that papers report, by task of lmms-eval: recipes/eval/benchmarks.yaml."""
    table = recipes_folder() / "eval" / "benchmarks.yaml"
    values = read_yaml(table) if table.is_file() else {}
    return {each["task"]: list(each["metrics"]) for each in values.values()}


def _reported(found: Sequence[Measured]) -> list[Measured]:
    """The metrics that papers report; all of a task that is not in the table."""
    known = reported_metrics()
    return [
        each for each in found if each.metric.partition(" ")[0] in known.get(each.task, [each.metric.split(" ")[0]])
    ]


def _checked(rows: Sequence[ImportedRow]) -> list[ImportedRow]:
    """Rows whose columns agree in their samples, with the settings in which they differ.

    Raises:
        ValueError: other samples.
    """
    first: dict[str, ImportedRow] = {}
    for row in sorted(rows, key=lambda row: row.key[0] != "dense"):
        for column in row.measured:
            first.setdefault(column, row)
    checked = []
    for row in rows:
        differs = {}
        for column, measured in row.measured.items():
            other = first[column].measured[column]
            wrong = _differing(measured.content, other.content, known=True)
            if wrong or (measured.samples and other.samples and measured.samples.keys() != other.samples.keys()):
                raise ValueError(
                    f"{column}: {row.source} and {first[column].source} are not of the same samples "
                    f"({wrong or 'other ids'}); run both on the same version and the same part of the task."
                )
            settings = _differing(measured.settings, other.settings)
            if bool(measured.answers) != bool(other.answers):
                settings = "; ".join(filter(None, [settings, "samples of one file alone, so equality is not checked"]))
            if settings:
                differs[column] = settings
        checked.append(ImportedRow(row.key, row.title, row.measured, row.source, differs))
    return checked


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any], known: bool = False) -> str:
    """Keys whose values differ, with short values; `known`: keys that both have."""
    keys = [key for key in dict.fromkeys([*mine, *theirs]) if _plain(mine.get(key)) != _plain(theirs.get(key))]
    keys = [key for key in keys if not known or (mine.get(key) is not None and theirs.get(key) is not None)]
    return "; ".join(f"{key}: {_short(mine.get(key))} and {_short(theirs.get(key))}" for key in keys)


def _plain(value: Any) -> str:
    return repr(sorted(value.items())) if isinstance(value, Mapping) else repr(value)


def _short(value: Any) -> str:
    text = f"{len(value)} documents" if isinstance(value, list) and len(value) > 3 else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
