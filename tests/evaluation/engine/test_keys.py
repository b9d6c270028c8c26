"""Changed arguments, recipes, bases, data and metrics never bring back an old number: in all three commands."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from tpcompress.bundled import base_path
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.engine import model_cell
from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.insertion.attach import attach
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.lab.estimators.run import run_estimators
from tpcompress.lab.study.run import run_study
from tpcompress.models import load_base, load_processor

QUIET = Console(quiet=True)
DATA = {"class_path": "BenchmarkData", "init_args": {"num_train": 2, "num_val": 0, "batch_size": 2, "num_workers": 0}}
RECIPE: dict[str, Any] = {
    "trainer": {"max_steps": 1, "accelerator": "cpu"}, "model": {"base": "tiny_llava"}, "data": DATA
}  # fmt: skip
MERGED = {"type": "merged", "proportional": True}
KINDS = ("comparison", "study", "estimators")
RUN: dict[str, Callable[[str, Path], Any]] = {
    "comparison": lambda path, out: run_comparison(path, out, QUIET),
    "study": lambda path, out: run_study(path, out, QUIET),
    "estimators": lambda path, out: run_estimators(path, str(out), None, QUIET),
}
FREE = {
    "comparison": "training-free-merged-l0-16-seed0",
    "study": "grid-training-free-merged-none-to-merged-16-seed0",
    "estimators": "free-merged-16",
}
"""Name of the cell of the pruner without training."""


def write(folder: Path, name: str, values: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / name)


def chat_file(folder: Path, rows: Any, answer: str = "") -> str:
    """Three rows of the benchmark as chat data; `answer` replaces the first one."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(3):
        rows[number]["images"][0].save(folder / f"{number}.png")
        question, right = rows[number]["conversations"][0]
        turns = [{"role": "user", "content": "<image>\n" + question["content"].replace("<image>\n", "")}]
        turns += [{"role": "assistant", "content": answer if answer and not number else right["content"]}]
        records.append({"images": [f"{number}.png"], "messages": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    return str(folder / "chat.json")


def file_of(kind: str, folder: Path, data: str, base: str, pruner: Any = None, rate: float = 5e-4, **more: Any) -> str:
    """The smallest file of each command: one pruner without training, one training run of one step."""
    pruner = pruner or MERGED
    recipe = RECIPE | {"model": {"base": "tiny_llava", "optimizer": {"lr": rate}}}
    common = {"base": base, "task": {"type": "chat", "data": data}, "budgets": [16]} | more
    if kind == "comparison":
        plan = {"pruner": "pool", "keep_tokens": 16}
        trained = write(folder, "recipe.yaml", recipe | {"model": recipe["model"] | {"plan": plan}})
        return write(folder, "c.yaml", common | {"training_free": [{"pruner": pruner}], "training_aware": [trained]})
    if kind == "study":
        contenders, ways = [{"name": "merged", "pruner": pruner}], [{"name": "loop"}]
        return write(folder, "c.yaml", common | dict(recipe=recipe, contenders=contenders, ways=ways, focus=16))
    own = {"estimators": ["soft noise"], "steps": [1], "seeds": [0], "scorers": {"cold": "mlp"}}
    recipe["model"] = {"optimizer": {"pruner_lr": rate}}
    return write(folder, "c.yaml", common | own | {"free": [{"pruner": pruner}], "recipe": recipe})


@pytest.fixture(scope="module")
def shared(tmp_path_factory, rows) -> tuple[str, str]:
    """Chat data and a base model in folders of their own."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(base_path("tiny_llava"), folder / "base")
    return chat_file(folder / "data", rows), str(folder / "base")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared) -> dict[str, Path]:
    """A finished output directory of each command."""
    folder = tmp_path_factory.mktemp("finished")
    for kind in KINDS:
        RUN[kind](file_of(kind, folder / kind, *shared), folder / kind / "out")
    return {kind: folder / kind / "out" for kind in KINDS}


@pytest.fixture(params=KINDS)
def again(request, finished, tmp_path) -> tuple[str, Path]:
    """A command and a copy of its finished output directory."""
    shutil.copytree(finished[request.param], tmp_path / "out")
    return request.param, tmp_path / "out"


def except_for(kind: str) -> pytest.MarkDecorator:
    """All commands, one of them among the slow tests."""
    params = [pytest.param(name, marks=pytest.mark.slow if name == kind else ()) for name in KINDS]
    return pytest.mark.parametrize("again", params, indirect=True)


def refused(kind: str, path: str, out: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        RUN[kind](path, out)


def test_an_unchanged_file_makes_nothing_again(again, shared, tmp_path, monkeypatch):
    kind, out = again
    before = {path: path.read_bytes() for path in (out / "cells").iterdir()}
    monkeypatch.setattr(Bench, "_try", lambda *_: pytest.fail("made again"))
    RUN[kind](file_of(kind, tmp_path, *shared), out)
    assert {path: path.read_bytes() for path in (out / "cells").iterdir()} == before


@except_for("study")
def test_a_changed_pruner_argument_is_measured(again, shared, tmp_path):
    """The run of the study has the pruner in its plan; without it, the folder is that of an interruption."""
    kind, out = again
    if kind == "study":
        shutil.rmtree(out / "train")
    changed = {"type": "merged", "proportional": False}
    RUN[kind](file_of(kind, tmp_path, *shared, pruner=changed), out)
    found = Scores.load(out / "cells" / f"{FREE[kind]}.npz")
    expected, old = (direct(shared, pruner) for pruner in (changed, MERGED))
    for position in (0, 1):
        np.testing.assert_allclose(loss(found)[position], loss(expected)[position], rtol=1e-4, atol=1e-6)
    assert not np.allclose(loss(found)[0], loss(old)[0], rtol=1e-4)
    record = json.loads((out / "cells" / f"{FREE[kind]}.json").read_text())
    assert record["key"]["plan"]["stages"][0]["pruner"]["proportional"] is False


def loss(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    return scores.sums["log_likelihood"]


def direct(shared: tuple[str, str], pruner: dict[str, Any]) -> Scores:
    """The number without any engine."""
    from tpcompress.evaluation.tasks import create_task

    model = attach(load_base(shared[1]).eval(), PruningPlan([Stage(pruner, keep_tokens=16)]))
    rows = create_task({"type": "chat", "data": shared[0]}).rows
    return evaluate(model, load_processor(shared[1]), rows, pack=True)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_of_another_recipe_is_neither_taken_nor_resumed(again, shared, tmp_path, stopped):
    kind, out = again
    if stopped:
        for done in out.glob("train/*/done"):
            done.unlink()
        for cell in (out / "cells").iterdir():
            cell.unlink()
    path = file_of(kind, tmp_path, *shared, rate=1e-3)
    refused(
        kind, path, out, r"holds a run trained with another setting \(recipe\); remove that folder to train it again"
    )
    assert list(out.glob("train/*/checkpoints/last.ckpt"))


def test_another_base_under_the_same_name_is_refused(again, shared, tmp_path):
    kind, out = again
    base = tmp_path / "base"
    shutil.copytree(shared[1], base)
    RUN[kind](file_of(kind, tmp_path, shared[0], str(base)), out)  # the same content elsewhere is the same base
    (weights,) = base.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    path = file_of(kind, tmp_path, shared[0], str(base))
    refused(kind, path, out, r"holds results of another setting \(base\); choose another --out or remove the folder")


def test_another_content_of_the_same_data_file_is_refused(again, shared, rows, tmp_path):
    kind, out = again
    data = Path(shared[0])
    kept = data.read_bytes()
    try:
        chat_file(data.parent, rows, answer="nothing")
        refused(kind, file_of(kind, tmp_path, *shared), out, r"holds results of another setting \(data\)")
    finally:
        data.write_bytes(kept)


def test_another_metric_is_refused(again, shared, tmp_path):
    kind, out = again
    path = file_of(kind, tmp_path, *shared, metric="exact_match")
    refused(kind, path, out, r"holds results of another setting \(metric\)")


@except_for("comparison")
def test_other_source_code_of_a_pruner_is_measured_again(again, shared, tmp_path, monkeypatch):
    kind, out = again
    made: list[str] = []
    monkeypatch.setattr(model_cell, "code_digest", lambda plan: "changed" if plan else "")
    real = Bench._write
    monkeypatch.setattr(Bench, "_write", lambda *a: (made.append(a[1].name), real(*a)))
    RUN[kind](file_of(kind, tmp_path, *shared), out)
    assert FREE[kind] in made


@pytest.mark.parametrize("name", ["report.json", "study.json", "settings.json"])
def test_a_folder_of_an_earlier_version_is_refused(name, shared, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    for kind in KINDS:
        path = file_of(kind, tmp_path / kind, *shared)
        refused(kind, path, tmp_path / "out", "holds results of an earlier version of tpcompress; choose another --out")


@except_for("comparison")
def test_a_run_that_ended_before_it_was_marked_is_taken(again, shared, tmp_path, monkeypatch):
    """Killed between the last checkpoint and the mark: nothing is trained again, and the numbers are the same."""
    kind, out = again
    (run,) = [path.parent for path in out.glob("train/*/done") if "dense" not in path.parent.name]
    (run / "done").unlink()
    lost = [p for p in (out / "cells").glob("*.json") if run.name in json.loads(p.read_text())["key"]["runs"]]
    before = {path: Scores.load(path.with_suffix(".npz")).value_IF for path in lost}
    for path in lost:
        path.unlink()
    monkeypatch.setattr("tpcompress.evaluation.engine.runs.run_recipe", lambda *a: pytest.fail("trained again"))
    RUN[kind](file_of(kind, tmp_path, *shared), out)
    assert lost
    assert (run / "done").is_file()
    for path, value_IF in before.items():
        np.testing.assert_array_equal(Scores.load(path.with_suffix(".npz")).value_IF, value_IF)
