"""The standalone commands accept any task, and their caches depend on its rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tpcompress.cli.main import main
from tpcompress.evaluation import budget_curve
from tpcompress.evaluation.budget_curve import BudgetCurve
from tpcompress.evaluation.find_layer import calibration_samples, calibration_task, run_find_layer
from tpcompress.evaluation.position_bias import position_bias
from tpcompress.evaluation.tasks import create_task
from tpcompress.export import load, load_processor
from tpcompress.insertion.attach import attach, detach
from tpcompress.insertion.plan import PruningPlan
from tpcompress.models import load_base
from tpcompress.models import load_processor as base_processor


@pytest.fixture(scope="module")
def base():
    return load_base("tiny_llava").eval()


def chat_file(folder: Path, count: int) -> str:
    records = []
    for number in range(count):
        Image.new("RGB", (96, 96), (20 * number, 100, 200)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    return str(folder / "chat.json")


def test_find_layer_on_a_task_equals_find_layer_on_its_data(tmp_path):
    data = chat_file(tmp_path, 6)
    options = (3, 0.01, [1], None, 4, "float32", "cpu", Console(file=io.StringIO()))
    direct = run_find_layer("tiny_llava", data, None, *options)
    assert run_find_layer("tiny_llava", None, None, *options, task={"type": "chat", "data": data}) == direct
    assert direct.num_samples == 3


def test_more_rows_than_samples_are_shuffled_by_the_seed(tmp_path):
    rows, processor = create_task({"type": "chat", "data": chat_file(tmp_path, 6)}).rows, base_processor("tiny_llava")

    def colours(count: int, seed: int) -> list[float]:
        return [float(s["pixel_values"][0, 0, 0, 0]) for s in calibration_samples(processor, rows, count, seed)]

    in_order = colours(6, 1)
    assert in_order == sorted(set(in_order)), "with as many samples as rows, rows are taken in order"
    for seed in range(3):
        shuffled = [int(Path(images[0]).stem) for images in rows.shuffle(seed)[:3]["images"]]
        assert [in_order.index(colour) for colour in colours(3, seed)] == shuffled


def test_calibration_data_of_a_bundled_base_is_the_training_split():
    task = calibration_task("tiny_llava", None, None, 5, 7)
    assert task.config() == {"type": "benchmark", "num_images": 5, "seed": 7, "split": "train"}


def test_position_bias_of_a_prepared_task(base):
    task = create_task({"type": "benchmark", "num_images": 6})
    attach(base, PruningPlan.of("uniform:36"))
    (found,) = position_bias(base, task.prepare(base_processor("tiny_llava"), batch_size=4).batches)
    detach(base)
    assert found.num_images == 6
    assert found.frequency.sum() == pytest.approx(36)
    assert set(found.frequency.flat) == {0.0, 1.0}


def test_a_budget_curve_on_a_task_is_the_score_of_the_task(tmp_path):
    (tmp_path / "plan.yaml").write_text("{pruner: uniform, keep_tokens: 16}")
    out = tmp_path / "out"
    assert main(["export", str(out), "--base", "tiny_llava", "--plan", str(tmp_path / "plan.yaml")]) == 0
    task = create_task({"type": "benchmark", "num_images": 8, "seed": 3})
    curve = BudgetCurve("9", Console(file=io.StringIO()), task=task)
    (point,) = curve(out, json.loads((out / "manifest.json").read_text()))
    scores = task.score(load(out, keep_tokens=9), load_processor(out))
    assert (point.data, point.images, point.retained) == (task.description, 8, 9)
    assert point.accuracy == pytest.approx(scores.score)


def test_a_stored_budget_curve_depends_on_the_content_of_the_rows(tmp_path, monkeypatch):
    (tmp_path / "plan.yaml").write_text("{pruner: uniform, keep_tokens: 16}")
    out = tmp_path / "out"
    assert main(["export", str(out), "--base", "tiny_llava", "--plan", str(tmp_path / "plan.yaml")]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    measured, measure = [], budget_curve._point

    def count(*arguments):
        measured.append(arguments[3])
        return measure(*arguments)

    monkeypatch.setattr(budget_curve, "_point", count)
    data = chat_file(tmp_path, 4)

    def run():
        curve = BudgetCurve("9", Console(file=io.StringIO()), task={"type": "chat", "data": data})
        curve.cache = tmp_path / "budget_curve.json"
        return curve(out, manifest)

    assert run() == run()
    assert len(measured) == 1, "the second curve is read from the file"
    Image.new("RGB", (96, 96), (0, 0, 0)).save(tmp_path / "0.png")
    run()
    assert len(measured) == 2, "an image has changed under the same name"
