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

from tpcompress.data.prompts import prompt_inputs
from tpcompress.export import export
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
