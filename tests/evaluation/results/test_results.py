"""Result files of other harnesses: what is read, how rows are joined, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import yaml
from rich.console import Console

from tpcompress.evaluation.compare.imported import import_rows, reported_metrics
from tpcompress.evaluation.compare.mixed_table import as_records, mixed_tables
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.results import find_reader, list_readers

N = 40


def lmms(folder: Path, right: Any, plan: str | None = None, task: str = "gqa", **changes: Any) -> str:
    """Result and samples files as lmms-eval writes them, of N samples; `right` holds their values."""
    folder.mkdir(parents=True, exist_ok=True)
    metric = changes.pop("metric", "exact_match")
    score = changes.pop("score", float(np.mean(right)))
    config = {"dataset_path": "hub/gqa", "test_split": "test", "generation_kwargs": {"max_new_tokens": 16}}
    arguments = "pretrained=tiny_llava" + (f",plan={plan}" if plan else "")
    values: dict[str, Any] = {
        "results": {task: {"alias": task, f"{metric},none": score, f"{metric}_stderr,none": 0.1, "submission,none": 7}},
        "configs": {task: config | {"doc_to_text": f"<function f at {id(config):#x}>"} | changes.pop("config", {})},
        "versions": {task: changes.pop("version", 1.0)},
        "n-shot": {task: 0},
        "config": {"model": "tpcompress", "model_args": arguments, "limit": changes.pop("limit", None),
                   "model_backend": "a.B (chat)"},
        "throughput": {"avg_vision_tokens": 576.0, "avg_retained_tokens": 64.0 if plan else 576.0},
    }  # fmt: skip
    ids = changes.pop("ids", range(len(right)))
    assert not changes
    path = folder / "20260101_results.json"
    path.write_text(json.dumps(values))
    lines = [
        {
            "doc_id": index,
            "doc_hash": f"h{index}",
            "target": f"t{index}",
            metric: value,
            "filtered_resps": [f"a{value}"],
        }
        for index, value in zip(ids, right, strict=True)
    ]
    (folder / f"20260101_samples_{task}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


def pair(folder: Path, values: Any, plan: str = "divprune:64", **changes: Any) -> list[dict[str, str]]:
    """Entries of a dense and a pruned model; the changes are those of the pruned one."""
    dense, pruned = values
    return [{"lmms_eval": lmms(folder / "a", dense)}, {"lmms_eval": lmms(folder / "b", pruned, plan, **changes)}]


@pytest.fixture
def values() -> tuple[list[float], list[float]]:
    """Dense and pruned answers: 30 and 25 of 40 right, 7 lost and 2 gained."""
    dense = [1.0] * 30 + [0.0] * 10
    pruned = [0.0] * 7 + [1.0] * 23 + [1.0] * 2 + [0.0] * 8
    return dense, pruned


def test_a_pair_has_intervals_paired_differences_and_flips(tmp_path: Path, values: Any) -> None:
    rows = import_rows(pair(tmp_path, values))
    assert [row.key for row in rows] == [("dense", None, None, 0, 0), ("training_free", "divprune", 64, 0, 0)]
    first, second = (row.measured["gqa exact_match"] for row in rows)
    assert (first.score, second.score) == (0.75, 0.625)
    gain = second.difference(first)
    assert gain is not None
    assert gain.delta == pytest.approx(-0.125)
    assert gain.high - gain.low < 2 * (first.ci95 + second.ci95) * 0.8  # type: ignore[operator]
    assert second.flips(first) == (7 / N, 2 / N)
    scores, changes = mixed_tables({}, rows)
    assert scores.header == ["model", "tokens", "gqa exact_match (percent)", "% of dense"]
    assert scores.rows[1][:2] == ["training-free divprune, 64", "64"]
    assert scores.rows[1][2].startswith("62.5 ±")
    assert scores.rows[1][3] == "83.3"
    assert changes.rows[0][1].endswith(", 17.5 / 5.0 %")
    (_, record) = as_records(rows)
    assert record["against_dense"] == gain
    assert (record["vision_tokens"], record["retained_tokens"]) == (576.0, 64.0)


def test_our_rows_and_theirs_are_one_table(tmp_path: Path, values: Any) -> None:
    ours = Report([Row("dense", score=0.9, ci95=0.01, learnt=["a"], families={"a": 0.9}),
                   Row("training_free", "divprune", 64, score=0.8, ci95=0.01, retained_tokens=64, families={"a": 0.8}),
                   Row("training_free", "random", 64, score=0.6, ci95=0.01, retained_tokens=64, families={"a": 0.6})],
                  meta={"metric": "exact_match"})  # fmt: skip
    rows = import_rows(pair(tmp_path, values))
    table, _ = mixed_tables({"mine": ours}, rows)
    assert [row[0] for row in table.rows] == ["dense", "training-free divprune, 64", "training-free random, 64"]
    assert table.rows[1][2:4] == ["80.0 ±1.0", table.rows[1][3]]
    assert table.rows[1][4] == f"{100 * (0.8 / 0.9 + 0.625 / 0.75) / 2:.1f}"
    assert table.rows[2][3:] == ["", "–"]


def test_a_score_that_is_no_mean_has_no_interval(tmp_path: Path, values: Any) -> None:
    entries = [
        {"lmms_eval": lmms(tmp_path / name, right, plan, "mme", metric="mme_perception_score", score=score)}
        for name, right, plan, score in (("a", values[0], None, 1500.0), ("b", values[1], "divprune:64", 1400.0))
    ]
    rows = import_rows(entries)
    measured = rows[1].measured["mme mme_perception_score"]
    assert (measured.scale, measured.ci95) == (None, None)
    scores, changes = mixed_tables({}, rows)
    assert scores.rows[1][2] == "1400.0"
    assert scores.header[2] == "mme mme_perception_score (points)"
    assert changes.rows[0][1] == "-100.0 (no interval), 17.5 / 5.0 %"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2.0}, "task version: 2.0 and 1.0"),
        ({"limit": 40}, "limit"),
        ({"ids": range(1, N + 1)}, "documents"),
        ({"config": {"test_split": "val"}}, "data"),
    ],
)
def test_other_samples_are_refused(tmp_path: Path, values: Any, changes: dict[str, Any], words: str) -> None:
    entries = pair(tmp_path, values, **changes)
    with pytest.raises(ValueError, match="not of the same samples") as found:
        import_rows(entries)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_other_settings_are_marked_and_not_averaged(tmp_path: Path, values: Any) -> None:
    other = {"generation_kwargs": {"max_new_tokens": 64}}
    rows = import_rows(pair(tmp_path, values, config=other))
    (scores,) = mixed_tables({}, rows)
    assert scores.rows[1][2].endswith("†")
    assert scores.rows[1][3] == "–"
    assert "generation_kwargs: {'max_new_tokens': 64} and {'max_new_tokens': 16}" in scores.note


def test_results_without_samples_are_marked(tmp_path: Path, values: Any) -> None:
    path = Path(lmms(tmp_path / "b", values[1], "divprune:64"))
    next(path.parent.glob("*samples*")).unlink()
    rows = import_rows([{"lmms_eval": lmms(tmp_path / "a", values[0])}, {"lmms_eval": str(path)}])
    assert "equality is not checked" in rows[1].differs["gqa exact_match"]


def test_a_comparison_of_results_alone_runs_no_model(tmp_path: Path, values: Any) -> None:
    config = tmp_path / "c.yaml"
    entries = pair(tmp_path, values, "dart:64")
    config.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "results": entries}))
    with open(tmp_path / "log", "w") as file:
        assert run_comparison(str(config), None, Console(file=file, width=200)) == {}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tasks.json", "tasks.md"]
    assert "| training-free dart, 64 |" in (tmp_path / "out" / "tasks.md").read_text()
    assert len(json.loads((tmp_path / "out" / "tasks.json").read_text())) == 2


TABLES = {
    "csv": "split,Overall,AR\nnone,0.625,0.5\n",
    "tsv": "split\tOverall\tAR\nnone\t0.625\t0.5\n",
    "json": '{"Overall": 0.625, "AR": 0.5}',
}


@pytest.mark.parametrize("ending", [*TABLES, "xlsx"])
def test_score_files_of_vlmevalkit(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"mine_MMBench_DEV_EN_acc.{ending}"
    if ending == "xlsx":
        book = openpyxl.Workbook()
        for row in (["split", "Overall", "AR"], ["none", 0.625, 0.5]):
            book.active.append(row)
        book.save(path)
    else:
        path.write_text(TABLES[ending])
    model, found = find_reader("vlmevalkit").read(path, dataset="MMBench_DEV_EN")
    assert model.arm is None
    assert [(m.task, m.metric, m.score) for m in found] == [
        ("MMBench_DEV_EN", "Overall", 0.625),
        ("MMBench_DEV_EN", "AR", 0.5),
    ]
    _, (one,) = find_reader("vlmevalkit").read(path, metrics=["AR"])
    assert one.score == 0.5


def test_samples_of_vlmevalkit_are_paired(tmp_path: Path, values: Any) -> None:
    entries = []
    for name, right in zip(("dense", "pruned"), values, strict=True):
        path = tmp_path / f"{name}_MMB.csv"
        lines = [f"{index},{int(value)},A" for index, value in enumerate(right)]
        path.write_text("index,hit,prediction\n" + "\n".join(lines) + "\n")
        arm = {"arm": "dense"} if name == "dense" else {"arm": "training_free", "pruner": "divprune", "keep_tokens": 64}
        entries.append({"vlmevalkit": str(path), "dataset": "MMB", **arm})
    rows = import_rows(entries)
    first, second = (row.measured["MMB hit"] for row in rows)
    assert (first.score, second.score) == (75.0, 62.5)
    gain = second.difference(first)
    assert gain is not None
    assert gain.delta == -12.5
    assert gain.low < -12.5 < gain.high
    assert second.flips(first) == (7 / N, 2 / N)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("gqa.json", "an entry is a mapping"),
        ({"lm_eval": "x"}, "one of the keys lmms_eval, vlmevalkit"),
        ({"lmms_eval": "x.json", "arm": "prunned"}, "no arm 'prunned'"),
        ({"lmms_eval": "no/such.json"}, "No results at no/such.json"),
        ({"lmms_eval": "bad.json"}, "is not JSON"),
        ({"lmms_eval": "other.json"}, "no results file of lmms-eval"),
        ({"lmms_eval": "good.json", "metrics": ["accuracy"]}, "has no scores; it has gqa: exact_match"),
        ({"lmms_eval": "good.json", "tasks": ["pope"]}, r"no scores of \['pope'\]"),
        ({"lmms_eval": "good.json", "metric": ["x"]}, "unknown key metric"),
        ({"vlmevalkit": "bad.json"}, "cannot be read as json"),
        ({"vlmevalkit": "x.pkl"}, "results are read from|No results at"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: Any, values: Any, entry: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("other.json").write_text("{}")
    Path("good.json").write_text(Path(lmms(tmp_path / "a", values[0])).read_text())
    with pytest.raises((ValueError, FileNotFoundError), match=words) as found:
        import_rows([entry])
    assert "\n" not in str(found.value)


def test_one_model_has_a_score_once(tmp_path: Path, values: Any) -> None:
    paths = [lmms(tmp_path / name, values[0]) for name in "ab"]
    with pytest.raises(ValueError, match="both have gqa exact_match of the same model"):
        import_rows([{"lmms_eval": path} for path in paths])
    rows = import_rows([{"lmms_eval": paths[0]}, {"lmms_eval": paths[1], "seed": 1}])
    assert [row.key[4] for row in rows] == [0, 1]


def test_table_of_benchmarks() -> None:
    assert set(list_readers()) == {"lmms_eval", "vlmevalkit"}
    known = reported_metrics()
    assert known["mme"] == ["mme_perception_score", "mme_cognition_score"]
    assert len(known) == 10
