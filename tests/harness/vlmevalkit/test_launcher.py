"""The launcher and the model class of VLMEvalKit against a stub that is written from its documentation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tpcompress.evaluation.results import find_reader
from tpcompress.harness.vlmevalkit import model as models
from tpcompress.harness.vlmevalkit.launcher import RECORD, main, model_name

RUN = """
import argparse, csv, json, logging, os
from vlmeval.config import supported_VLM

parser = argparse.ArgumentParser()
parser.add_argument("--data", nargs="+")
parser.add_argument("--model", nargs="+")
parser.add_argument("--work-dir", default="./outputs")
args = parser.parse_args()
for name in args.model:
    model = None
    root = os.path.join(args.work_dir, name, "T20260101_G0")
    os.makedirs(root, exist_ok=True)
    for data in args.data:
        try:
            model = supported_VLM[name](use_vllm=False) if model is None else model
            model.set_dump_image(None)
            rows = json.load(open(data))
            dataset = os.path.splitext(os.path.basename(data))[0]
            for row in rows:
                row["prediction"] = model.generate(message=row["message"], dataset=dataset)
                row["hit"] = int(row["prediction"] == row["answer"])
            table = os.path.join(root, f"{name}_{dataset}_result.csv")
            with open(table, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["index", "answer", "prediction", "hit"])
                writer.writerows([[r["index"], r["answer"], r["prediction"], r["hit"]] for r in rows])
            with open(os.path.join(root, f"{name}_{dataset}_acc.csv"), "w", newline="") as file:
                csv.writer(file).writerows([["split", "Overall"], ["none", sum(r["hit"] for r in rows) / len(rows)]])
        except Exception as error:
            logging.error("%s failed: %s", data, error)
            continue
"""


class BaseModel:
    """`vlmeval.vlm.base.BaseModel`: checks pieces, then calls `generate_inner`."""

    def __init__(self) -> None:
        pass

    def generate(self, message: Any, dataset: str | None = None) -> str:
        message = [{"type": "text", "value": message}] if isinstance(message, str) else message
        assert all(piece["type"] in self.allowed_types for piece in message)  # type: ignore[attr-defined]
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of VLMEvalKit, installed: its folder."""
    clone = tmp_path / "VLMEvalKit"
    clone.mkdir()
    (clone / "run.py").write_text(RUN)
    contents: dict[str, dict[str, Any]] = {
        "vlmeval": {"__file__": str(clone / "vlmeval" / "__init__.py")}, "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel}, "vlmeval.config": {"supported_VLM": {}},
    }  # fmt: skip
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MMEVAL_ROOT", raising=False)
    models.model_class.cache_clear()
    yield clone
    models.model_class.cache_clear()


@pytest.fixture
def data(tmp_path: Path, docs: list[dict[str, Any]]) -> Path:
    """A data set of five questions, one without an image."""
    rows = []
    for number, doc in enumerate(docs[:5]):
        pieces = []
        for image in doc["images"]:
            image.convert("RGB").save(tmp_path / f"{number}.png")
            pieces.append({"type": "image", "value": str(tmp_path / f"{number}.png")})
        message = [*pieces, {"type": "text", "value": doc["question"]}]
        rows.append({"index": number, "answer": doc["answer"], "message": message})
    path = tmp_path / "SHAPES.json"
    path.write_text(json.dumps(rows))
    return path


BASE = ("--pretrained", "tiny_llava", "--device", "cpu")


def test_run_writes_scores_and_counts(kit: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    work = tmp_path / "outputs"
    for plan in ((), ("--plan", "divprune:16")):
        assert main([*BASE, *plan, "--max-new-tokens", "6", "--data", str(data), "--work-dir", str(work)]) == 0
    out = capsys.readouterr().out
    assert "SHAPES: 144.0 vision tokens per prompt, 16.0 retained (5 prompts, 4 with images or videos)." in out
    assert sys.argv[0] != str(kit / "run.py")
    read = {}
    for name, arm in (("tiny_llava", "dense"), ("tiny_llava-divprune-16", "training_free")):
        name = model_name({"pretrained": "tiny_llava"} | ({"plan": "divprune:16"} if "16" in name else {}))
        record = json.loads((work / name / RECORD).read_text())
        assert record["counts"]["SHAPES"] == {
            "prompts": 5, "with_media": 4, "vision_tokens": 144.0, "retained_tokens": 144.0 if arm == "dense" else 16.0,
        }  # fmt: skip
        table = next((work / name).rglob("*_acc.csv"))
        samples = next((work / name).rglob("*_result.csv"))
        model, (measured,) = find_reader("vlmevalkit").read(table, samples=str(samples))
        assert (model.arm, measured.task, measured.metric) == (arm, "SHAPES", "Overall")
        assert measured.score == pytest.approx(sum(measured.samples.values()) / 5)
        assert measured.retained_tokens == record["counts"]["SHAPES"]["retained_tokens"]
        read[arm] = measured
    assert model.pruner == "divprune"
    assert model.keep_tokens == 16
    assert read["training_free"].difference(read["dense"]) is not None
    assert set(read["dense"].answers) == {"0", "1", "2", "3", "4"}


def test_errors_that_the_run_only_logs_fail(kit: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    rows = json.loads(data.read_text())
    rows[2]["message"][0]["value"] = str(tmp_path / "gone.png")
    data.write_text(json.dumps(rows))
    assert main([*BASE, "--data", str(data), "--work-dir", str(tmp_path / "outputs")]) == 1
    assert "1 answers failed, so scores are wrong; the first: SHAPES 2 cannot be encoded" in capsys.readouterr().err


def test_conversations_and_plain_text(kit: Path, docs: list[dict[str, Any]]) -> None:
    model = models.model_class()(pretrained="tiny_llava", device="cpu", max_new_tokens=4)
    asked = {"role": "user", "content": [{"type": "image", "value": docs[0]["images"][0]},
                                         {"type": "text", "value": docs[0]["question"]}]}  # fmt: skip
    first = model.chat([asked], dataset="MT")
    again = model.chat([asked, {"role": "assistant", "content": first}, asked], dataset="MT")
    assert first
    assert again
    assert model.tally.sums["MT"] == (2, 2, 3 * 144, 3 * 144)
    assert isinstance(model.generate("what ?", dataset="T"), str)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*BASE, "--model", "x"], "--model belongs to this launcher"),
        ([*BASE, "--plan", "divprune:16", "--keep-tokens", "3"], "plan and keep_tokens exclude each other"),
        ([*BASE, "--vlmevalkit", "nowhere"], "--vlmevalkit FOLDER"),
        ([*BASE, "--dtype", "int3"], "dtype must be one of"),
    ],
)
def test_mistakes_are_one_line(kit: Path, args: list[str], words: str, capsys: Any) -> None:
    assert main([*args, "--data", "X"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_answers_of_errors_are_refused(kit: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("SKIP_ERR", "1")
    assert main([*BASE, "--data", "X"]) == 2
    assert "SKIP_ERR=1 makes VLMEvalKit count errors as answers" in capsys.readouterr().err


def test_without_vlmevalkit_it_says_what_to_install(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    models.model_class.cache_clear()
    assert main([*BASE, "--data", "X"]) == 2
    assert "VLMEvalKit (vlmeval) is not installed" in capsys.readouterr().err
