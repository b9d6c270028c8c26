"""The real lmms-eval on a local task: export, training-free plan, dense base. Run by scripts/test_lmms_eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness.lmms_eval.local_task import ROWS, TASK, questions, write
from PIL import Image
from rich.console import Console

from tpcompress.bundled import recipes_folder
from tpcompress.data.prompts import prompt_inputs
from tpcompress.evaluation.compare.imported import import_rows
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.export import export
from tpcompress.harness.generation import GenerationSettings
from tpcompress.insertion.attach import attach
from tpcompress.models import load_base, load_processor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed; scripts/test_lmms_eval"),
]
PLAN = "divprune:16"
MODELS = {"dense": None, "free": PLAN, "exported": PLAN}
RUNS = [(name, size) for name in MODELS for size in (1, 4)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Result files of all runs, which one process of lmms-eval makes."""
    folder = Path(os.environ.get("TPCOMPRESS_LMMS_OUT") or tmp_path_factory.mktemp("lmms"))
    base: Any = load_base("tiny_llava").eval()
    export(attach(base, PLAN), load_processor("tiny_llava"), folder / "exported", overwrite=True)
    arguments = {
        "dense": "pretrained=tiny_llava", "free": f"pretrained=tiny_llava,plan={PLAN}",
        "exported": f"pretrained={folder / 'exported'}",
    }  # fmt: skip
    tasks = write(folder / "tasks")
    runs = [
        {
            "model": "tpcompress", "model_args": f"{arguments[name]},dtype=float32", "tasks": TASK,
            "include_path": str(tasks), "batch_size": str(size), "device": "cpu", "log_samples": True,
            "output_path": str(folder / f"{name}-{size}"), "verbosity": "DEBUG",
        }
        for name, size in RUNS
    ]  # fmt: skip
    (folder / "runs.yaml").write_text(yaml.safe_dump(runs))
    command = [sys.executable, "-m", "lmms_eval", "eval", "--config", str(folder / "runs.yaml")]
    cache = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "LMMS_EVAL_HOME": str(folder / "cache")}
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return {(name, size): next((folder / f"{name}-{size}").rglob("*_results.json")) for name, size in RUNS}


def samples(results: Path) -> list[dict[str, Any]]:
    path = results.with_name(results.name.replace("_results.json", f"_samples_{TASK}.jsonl"))
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def own_answers(plan: str | None) -> list[str]:
    """Answers of our own `generate`, one prompt at a time."""
    model: Any = load_base("tiny_llava").eval()
    processor = load_processor("tiny_llava")
    if plan is not None:
        attach(model, plan)
    found = []
    for doc in questions():
        images = [Image.open(BytesIO(one)).convert("RGB") for one in doc["images"]]
        inputs = prompt_inputs(processor, doc["question"], images)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_answers_and_counts(outputs: dict[tuple[str, int], Path], name: str, size: int) -> None:
    rows = samples(outputs[name, size])
    assert [row["doc_id"] for row in rows] == list(range(ROWS))
    said = [row["filtered_resps"] for row in rows]
    assert [text[0] if isinstance(text, list) else text for text in said] == own_answers(MODELS[name])
    kept = 144 if MODELS[name] is None else 16
    counts = [(row["token_counts"][0]["vision_tokens"], row["token_counts"][0]["retained_tokens"]) for row in rows]
    assert counts == [(144 * len(doc["images"]), kept * len(doc["images"])) for doc in questions()]


@pytest.mark.parametrize("name", list(MODELS))
def test_results_hold_mean_counts(outputs: dict[tuple[str, int], Path], name: str) -> None:
    results = json.loads(outputs[name, 4].read_text())
    assert results["throughput"]["avg_vision_tokens"] == pytest.approx(144 * 12 / 11)
    kept = 144 if MODELS[name] is None else 16
    assert results["throughput"]["avg_retained_tokens"] == pytest.approx(kept * 12 / 11)
    assert results["results"][TASK]["exact_match,none"] >= 0.5
    print(name, json.dumps(results["results"][TASK]), json.dumps(results["throughput"]))


def test_compare_reads_the_results(outputs: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    entries = [{"lmms_eval": str(outputs[name, 4])} for name in ("dense", "free")]
    entries.append({"lmms_eval": str(outputs["exported", 4]), "label": "exported divprune"})
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "results": entries}))
    with open(tmp_path / "log", "w") as file:
        run_comparison(str(config), None, Console(file=file, width=200))
    print((tmp_path / "out" / "tasks.md").read_text())
    records = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert [(r["arm"], r["pruner"], r["keep_tokens"]) for r in records] == [
        ("dense", None, None), ("training_free", "divprune", 16), ("training_free", "exported divprune", 16),
    ]  # fmt: skip
    dense, free, exported = records
    assert all(r["samples"] == ROWS and r["ci95"] is not None and r["other_settings"] is None for r in records)
    assert free["score"] == exported["score"]
    assert free["against_dense"] == exported["against_dense"]
    assert free["against_dense"][0] == pytest.approx(free["score"] - dense["score"])
    assert free["gained"] - free["lost"] == pytest.approx(free["score"] - dense["score"])
    assert free["retained_tokens"] == pytest.approx(16 * 12 / 11)


def test_results_of_another_limit_are_refused(outputs: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    shorter = tmp_path / outputs["free", 4].name
    values = json.loads(outputs["free", 4].read_text())
    values["config"]["limit"] = 6
    shorter.write_text(json.dumps(values))
    rows = samples(outputs["free", 4])[:6]
    name = shorter.name.replace("_results.json", f"_samples_{TASK}.jsonl")
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="not of the same samples"):
        import_rows([{"lmms_eval": str(outputs["dense", 4])}, {"lmms_eval": str(shorter)}])


def test_benchmarks_are_tasks_of_the_installed_lmms_eval() -> None:
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    index = TaskManager().task_index
    table = yaml.safe_load((recipes_folder() / "eval" / "benchmarks.yaml").read_text())
    assert len(table) == 10
    for name, entry in table.items():
        assert index[entry["task"]]["type"] == "task", name
        config = load_yaml_config(index[entry["task"]]["yaml_path"], mode="simple")
        assert set(entry["metrics"]) <= {each["metric"] for each in config["metric_list"]}, name
        assert config["dataset_path"] == entry["data"], name
        unlimited = "max_new_tokens" not in config["generation_kwargs"]
        assert unlimited == ("max_new_tokens" in entry.get("needs", "")), name
        GenerationSettings.of(config["generation_kwargs"])  # every setting is supported
