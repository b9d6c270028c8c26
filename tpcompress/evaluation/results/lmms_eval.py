"""Results of lmms-eval: `DATE_results.json` and, beside it, `DATE_samples_TASK.jsonl`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpcompress.errors import first_line
from tpcompress.evaluation.results.base import Measured, Model, Reader, number_of
from tpcompress.evaluation.results.model_of import model_of

SETTINGS = ("generation_kwargs", "lmms_eval_specific_kwargs", "doc_to_text", "output_type", "repeats", "filter_list")
"""Keys of a task's config that decide prompts and answers, but not the samples."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Where a function of a task was in memory."""
MODEL = ("pretrained", "plan", "dense", "keep_tokens", "keep_ratio", "device", "device_map")
"""Arguments that say which model a row is of, or where it runs; all others are settings."""
NOT_SCORES = ("alias", "submission", "samples")
ENDING = "_results.json"


class LmmsEval(Reader):
    """Results of lmms-eval."""

    name = "lmms_eval"

    def read(
        self,
        path: Path,
        metrics: Sequence[str] = (),
        samples: str | None = None,
        tasks: Sequence[str] = (),
        **other: Any,
    ) -> tuple[Model, list[Measured]]:
        """See `Reader.read`.

        Args:
            path: results file, or a folder with one.
            metrics: metrics to read, without their filter.
            samples: folder of the samples files; default: that of the results.
            tasks: tasks to read; default: all.
            other: not known.
        """
        if other:
            raise ValueError(f"lmms_eval: unknown key {', '.join(other)}; known: samples, tasks, metrics.")
        path = _in_folder(path) if path.is_dir() else path
        values, found = _results(path), list[Measured]()
        for task, scores in values["results"].items():
            if tasks and task not in tasks:
                continue
            rows = _samples(path, task, samples)
            for name, score in _scores(scores, metrics):
                found.append(_measured(values, task, name, score, rows))
        missing = sorted(set(tasks) - {each.task for each in found})
        if missing or not found:
            raise ValueError(f"{path} has no scores{f' of {missing}' if missing else ''}; it has {_listed(values)}.")
        config = values.get("config", {})
        return model_of(_arguments(config.get("model_args")), str(config.get("model", "model"))), found


def _in_folder(folder: Path) -> Path:
    """The only results file in a folder.

    Raises:
        ValueError: none or several.
    """
    files = sorted(folder.rglob(f"*{ENDING}"))
    if len(files) != 1:
        listed = ", ".join(str(file.relative_to(folder)) for file in files[:4])
        raise ValueError(f"{folder} holds {len(files)} results files ({listed or 'none'}); give the path of one.")
    return files[0]


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"No results at {path}; give the DATE_results.json that lmms-eval wrote.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({first_line(error)}).") from error
    if not isinstance(values, dict) or not isinstance(values.get("results"), dict) or "configs" not in values:
        raise ValueError(f"{path} is no results file of lmms-eval, which has `results` and `configs`.")
    return values


def _scores(scores: Mapping[str, Any], metrics: Sequence[str]) -> list[tuple[str, float]]:
    """(metric, score) of a task; keys are `metric,filter`."""
    found = []
    for key, value in scores.items():
        metric, _, kind = key.partition(",")
        score = number_of(value)
        if score is None or metric in NOT_SCORES or metric.endswith(("_stderr", "_stderr_clt")) or not kind:
            continue
        if metrics and metric not in metrics:
            continue
        found.append((metric if kind == "none" else f"{metric} ({kind})", score))
    missing = [metric for metric in metrics if not any(name.split(" ")[0] == metric for name, _ in found)]
    return [] if missing and not found else found


def _samples(path: Path, task: str, folder: str | None) -> list[dict[str, Any]]:
    """Samples of a task; empty if they were not logged."""
    name = path.name.removesuffix(ENDING)
    file = Path(folder or path.parent) / f"{name}_samples_{task}.jsonl"
    if not file.is_file():
        if folder is not None:
            raise FileNotFoundError(f"No samples at {file}.")
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        ids = [str(row["doc_id"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no samples file of lmms-eval ({first_line(error)}).") from error
    if len(set(ids)) < len(ids):
        raise ValueError(f"{file} has a sample twice: two runs wrote to it; run again with another output path.")
    return rows


def _measured(
    values: Mapping[str, Any], task: str, name: str, score: float, rows: Sequence[Mapping[str, Any]]
) -> Measured:
    metric, config, run = name.split(" ")[0], values["configs"].get(task, {}), values.get("config", {})
    known = {_identity(row): number for row in rows if (number := number_of(row.get(metric))) is not None}
    content = {
        "task version": values.get("versions", {}).get(task),
        "documents": sorted(_identity(row) for row in rows) or values.get("task_hashes", {}).get(task),
        "data": [config.get(key) for key in ("dataset_path", "dataset_name", "test_split")],
        "limit": [run.get("limit"), run.get("offset") or 0],
        "number of samples": (values.get("n-samples", {}).get(task) or {}).get("effective"),
    }
    settings: dict[str, Any] = {
        key: ADDRESS.sub("", str(config[key])) for key in SETTINGS if config.get(key) is not None
    }
    settings |= {"shots": values.get("n-shot", {}).get(task), "gen_kwargs": run.get("gen_kwargs") or None}
    settings |= {
        "way of prompts": _kind(run.get("model_backend")),
        "prompts": _digest(row.get("input") for row in rows),
    }
    version = str(values.get("lmms_eval_version") or "unknown")
    settings |= {} if version.startswith("unknown") else {"lmms-eval": version}
    arguments = _arguments(run.get("model_args")).items()
    settings |= {f"model_args {key}": value for key, value in arguments if key not in MODEL}
    return Measured(
        "lmms_eval", task, name, score, known if len(known) == len(rows) else {},
        {_identity(row): _answer(row) for row in rows}, content, settings, *_tokens(rows, values, task),
    )  # fmt: skip


def _identity(row: Mapping[str, Any]) -> str:
    """A sample by its number and a hash of its document and target.

    The `doc_hash` of lmms-eval 0.7.3 is that of an empty document in most tasks, so it tells no samples apart.
    """
    return f"{row['doc_id']}:{_digest([row.get('doc_hash', ''), row.get('target', '')])}"


def _digest(texts: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()[:12]


def _answer(row: Mapping[str, Any]) -> str:
    answer = row.get("filtered_resps", row.get("resps"))
    return str(answer[0] if isinstance(answer, list) and len(answer) == 1 else answer)


def _tokens(
    rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any], task: str
) -> tuple[float | None, float | None]:
    """Mean vision and retained tokens, from the samples or from the summary of the run."""
    counts = [count for row in rows for count in row.get("token_counts") or [] if count and count.get("vision_tokens")]
    if counts:
        return (
            sum(count["vision_tokens"] for count in counts) / len(counts),
            sum(count["retained_tokens"] for count in counts) / len(counts),
        )
    summary, alone = values.get("throughput", {}), len(values["results"]) == 1
    names = [f"avg_{what}/{task}" if not alone else f"avg_{what}" for what in ("vision_tokens", "retained_tokens")]
    return summary.get(names[0]), summary.get(names[1])


def _arguments(text: Any) -> dict[str, str]:
    """`model_args` as a mapping."""
    if isinstance(text, Mapping):
        return {str(key): str(value) for key, value in text.items()}
    pairs = [part.partition("=") for part in str(text or "").split(",") if "=" in part]
    return {key.strip(): value.strip().strip("'\"") for key, _, value in pairs}


def _kind(backend: Any) -> str | None:
    """`chat` or `simple`: how the task handed over its prompts."""
    return None if backend is None else str(backend).rpartition("(")[2].rstrip(")")


def _listed(values: Mapping[str, Any]) -> str:
    scores = {task: [name for name, _ in _scores(of, ())] for task, of in values["results"].items()}
    return "; ".join(f"{task}: {', '.join(names) or 'no scores'}" for task, names in scores.items()) or "no tasks"
