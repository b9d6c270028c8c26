"""Results of VLMEvalKit: a score file (`MODEL_DATASET_acc.csv`, `_score.csv`, `.json`), and a table of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpcompress.evaluation.results.base import Measured, Model, Reader, number_of
from tpcompress.evaluation.results.model_of import model_of
from tpcompress.evaluation.results.sheets import read_records
from tpcompress.export.folder import read_json

RECORD = "tpcompress.json"
"""File that the launcher writes into the folder of a model: its arguments, settings and token counts."""
SAMPLE_SCORES = ("hit", "score", "eval_score", "match", "correct")
"""Columns of sample tables that hold the score of a sample."""
SUFFIXES = ("_acc", "_score", "_rating")
SPLIT = ("split", "category", "l2-category")


class VlmEvalKit(Reader):
    """Results of VLMEvalKit."""

    name = "vlmevalkit"

    def read(
        self,
        path: Path,
        metrics: Sequence[str] = (),
        samples: str | None = None,
        dataset: str | None = None,
        **other: Any,
    ) -> tuple[Model, list[Measured]]:
        """See `Reader.read`.

        Args:
            path: score file, or a table of samples (with a column `index`), whose mean in percent is the score.
            metrics: columns of the score file to read.
            samples: table of samples beside a score file.
            dataset: name of the data set; default: the name of the file without model and ending.
            other: not known.
        """
        if other:
            raise ValueError(f"vlmevalkit: unknown key {', '.join(other)}; known: samples, dataset, metrics.")
        records = read_records(path)
        if not records:
            raise ValueError(f"{path} has no rows.")
        run = _record(path)
        task = dataset or _dataset(path, str(run.get("model", "")))
        rows = records if "index" in records[0] else read_records(Path(samples)) if samples else []
        values, answers, column = _samples(rows, Path(samples) if samples else path)
        content = {"samples": sorted(answers) or None, "split": sorted({str(row.get("split")) for row in rows}) or None}
        counts = run.get("counts", {}).get(task, {})
        shared = {
            "samples": values, "answers": answers, "content": content, "settings": run.get("settings", {}),
            "vision_tokens": counts.get("vision_tokens"), "retained_tokens": counts.get("retained_tokens"),
        }  # fmt: skip
        if "index" in records[0]:
            found = [Measured(self.name, task, column, 100 * float(np.mean(list(values.values()))), **shared)]
        else:
            found = [Measured(self.name, task, name, score, **shared) for name, score in _scores(records)]
        chosen = [each for each in found if not metrics or each.metric in metrics]
        if not chosen:
            raise ValueError(f"{path} has no score {', '.join(metrics)}; it has {', '.join(e.metric for e in found)}.")
        arguments = {key: str(value) for key, value in run.get("arguments", {}).items()}
        title = str(run.get("model") or path.stem)
        return (model_of(arguments, title) if arguments else Model(None, title=title)), chosen


def _scores(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(column, score); of several rows, with the name of the row."""
    found = []
    for row in records:
        label = next((str(value) for key, value in row.items() if key.lower() in SPLIT and value is not None), "")
        for column, value in row.items():
            score = number_of(value)
            if score is not None and column and column.lower() not in SPLIT:
                found.append((column if len(records) == 1 or not label else f"{column} ({label})", score))
    return found


def _samples(rows: Sequence[Mapping[str, Any]], path: Path) -> tuple[dict[str, float], dict[str, str], str]:
    """Values and answers by sample, and the column of the values.

    Raises:
        ValueError: no ids, no column with scores, or a sample twice.
    """
    if not rows:
        return {}, {}, ""
    column = next((name for name in SAMPLE_SCORES if number_of(rows[0].get(name)) is not None), None)
    if column is None or "index" not in rows[0]:
        raise ValueError(
            f"{path} is no table of scored samples: it needs `index` and one of {', '.join(SAMPLE_SCORES)}, and has "
            f"{', '.join(map(str, rows[0]))}."
        )
    ids = [_id(row["index"]) for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path} has a sample twice.")
    values = {key: number_of(row[column]) for key, row in zip(ids, rows, strict=True)}
    empty = next((key for key, value in values.items() if value is None), None)
    if empty is not None:
        raise ValueError(f"{path}: sample {empty} has no {column}.")
    answers = {key: str(row.get("prediction", "")) for key, row in zip(ids, rows, strict=True)}
    return {key: value for key, value in values.items() if value is not None}, answers, column


def _id(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def _record(path: Path) -> dict[str, Any]:
    """What the launcher wrote about the model, in the folder of the file or above it."""
    for folder in list(path.resolve().parents)[:3]:
        if (folder / RECORD).is_file():
            return read_json(folder / RECORD)
    return {}


def _dataset(path: Path, model: str) -> str:
    name = path.stem.removeprefix(f"{model}_") if model else path.stem
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name
