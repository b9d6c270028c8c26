"""Comparisons on rows of the user: any family, generated answers, several tasks; always a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from support import family_folder

from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.engine.plans import FreePruner
from tpcompress.evaluation.rank import run_rank
from tpcompress.evaluation.scoring.batches import check_applies
from tpcompress.evaluation.single import run_evaluation
from tpcompress.evaluation.tasks import create_task

FAMILIES = ["smolvlm", "qwen2_5_vl", "gemma3", "llava_onevision", "internvl"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four rows of several sizes, one with two images, with several right answers each."""
    folder, rows = tmp_path_factory.mktemp("own"), []
    for number in range(4):
        Image.new("RGB", (48 + 20 * number, 64), (60 * number, 100, 200)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is it ?"}, {"from": "gpt", "value": "red"}]
        rows.append({"image": f"{number}.png", "conversations": turns, "answers": ["red", "a red car"]})
    rows[0] |= {"image": ["0.png", "1.png"]}
    rows[0]["conversations"][0]["value"] = "<image><image>\nwhich ?"
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


@pytest.mark.parametrize(
    "name", [name if name == "smolvlm" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_is_compared_on_own_rows(name: str, data: str, tmp_path: Path) -> None:
    comparison = Comparison(
        base=str(family_folder(name)), data=data, metric="anls", generate={"max_new_tokens": 3, "batch_size": 3},
        budgets=(4,), downsample=True, hard_subset=4.0, training_free=(FreePruner("divprune"),), batch_size=3,
    )  # fmt: skip
    console = Console(record=True, width=160)
    report = run_comparison(comparison, tmp_path / "out", console)
    text = console.export_text()
    assert {row.arm for row in report.rows} == {"dense", "downsample", "training_free"}
    dense, pruned = report.find("dense"), report.find("training_free", "divprune", 4)
    assert dense.vision_tokens > pruned.retained_tokens > 0
    assert dense.score is not None
    assert pruned.changed is not None
    assert pruned.hard is not None
    assert report.meta["answers"].startswith("generated")
    (smaller,) = report.arm("downsample")
    assert (smaller.score is None) == smaller.note.startswith("not available")
    assert "all*" in text
    assert "In no family is the dense base clearly better than with blank images" in text
    assert "| · divprune | 4 /" in (tmp_path / "out" / "report.md").read_text()


def test_several_tasks_share_a_report(data: str, tmp_path: Path) -> None:
    tasks = (
        {"type": "chat", "data": data, "metric": "f1", "generate": {"max_new_tokens": 3}, "label": "mine"},
        {"type": "benchmark", "num_images": 3},
    )
    comparison = Comparison(tasks=tasks, budgets=(9,), training_free=(FreePruner("uniform"),))
    console = Console(record=True, width=160)
    reports = run_comparison(comparison, tmp_path, console)
    assert {name: report.meta["metric"] for name, report in reports.items()} == {
        "mine": "f1",
        "benchmark": "exact_match",
    }
    text = (tmp_path / "report.md").read_text()
    assert "| model | mine* (f1) | benchmark" in text
    assert "| training-free · uniform, 9 |" in text
    assert all((tmp_path / name / "report.json").is_file() for name in reports)


def test_one_model_is_evaluated_and_its_answers_are_kept(data: str, tmp_path: Path) -> None:
    task = create_task({"type": "chat", "data": data, "metric": "vqa_accuracy", "generate": {"max_new_tokens": 3}})
    console = Console(record=True, width=160)
    (scores,) = run_evaluation("tiny_llava", [task], "divprune:9@0", tmp_path / "out", console).values()
    lines = [json.loads(line) for line in (tmp_path / "out" / "chat.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == scores.questions.answer_Q.tolist()
    known = json.loads((tmp_path / "out" / "chat.json").read_text())
    assert known["metrics"]["vqa_accuracy"]["score"] == scores.score
    assert "vision tokens retained" in console.export_text()


def test_a_row_for_each_question_family_fits_a_terminal() -> None:
    console = Console(record=True, width=80)
    task = create_task({"type": "benchmark", "num_images": 2})
    (scores,) = run_evaluation("tiny_llava", [task], None, None, console).values()
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert [line[0] for line in lines if line[0] in ("all", *scores.names)] == ["all", *scores.names]
    assert not any("…" in word for line in lines for word in line)


@pytest.mark.parametrize("command", ["evaluate", "rank", "compare"])
@pytest.mark.parametrize(("metric", "wanted"), [("number", "a number"), ("choice_letter", "a letter or an option")])
def test_a_metric_that_applies_to_no_question_stops_at_the_first_score(
    command: str, metric: str, wanted: str, data: str, tmp_path: Path
) -> None:
    task = create_task({"type": "chat", "data": data, "metric": metric, "generate": {"max_new_tokens": 1}})
    config = Comparison(
        data=data, metric=metric, generate={"max_new_tokens": 1}, budgets=(9,), training_free=(FreePruner("uniform"),)
    )
    calls = {
        "evaluate": lambda: run_evaluation("tiny_llava", [task], None, tmp_path, Console(quiet=True)),
        "rank": lambda: run_rank("tiny_llava", task, "9", tmp_path, Console(quiet=True), rules=["uniform"]),
        "compare": lambda: run_comparison(config, tmp_path, Console(quiet=True)),
    }
    message = rf"^Metric {metric} applies to none of the 4 questions of \S+rows.json: no reference is {wanted}[^\n]*$"
    with pytest.raises(ValueError, match=message):
        calls[command]()
    assert not list(tmp_path.rglob("*.npz"))


def test_what_does_not_count_is_said_alike_by_evaluate_and_compare(data: str, tmp_path: Path) -> None:
    rows = json.loads(Path(data).read_text())
    rows[1]["answers"] = ["3"]
    turns = [{"from": "human", "value": "how many ?"}, {"from": "gpt", "value": "red"}]
    rows += [{"conversations": turns}, {**rows[2], "image": "gone.png"}]
    mixed = Path(data).with_name("mixed.json")
    mixed.write_text(json.dumps(rows))
    console, generate = Console(record=True, width=200), {"max_new_tokens": 1}
    task = create_task({"type": "chat", "data": str(mixed), "metric": "number", "generate": generate})
    run_evaluation("tiny_llava", [task], "uniform:9@0", tmp_path / "one", console)
    text = console.export_text()
    assert "5 questions about 5 rows, generated." in text
    assert "Only 1 of 5 questions count in number." in text
    known = json.loads((tmp_path / "one" / "chat.json").read_text())
    assert [known[name] for name in ("rows", "questions", "counted", "skipped")] == [5, 5, 1, 1]
    assert known["skipped_reasons"] == {"missing image": 1}
    config = Comparison(
        data=str(mixed), metric="number", generate=generate, budgets=(9,), training_free=(FreePruner("uniform"),)
    )
    report = run_comparison(config, tmp_path / "all", console)
    retained = report.find("training_free", "uniform", 9).retained_tokens
    assert retained == 5 * 9 / 4  # five images in the four questions that have one
    assert f"{retained:.1f} vision tokens retained, {retained:.1f} a layer, per question with an image." in text
    assert report.meta["skipped rows"] == 1
    text = " ".join(console.export_text().split())
    assert "nominal per image / retained / mean of the decoder layers, both per question with an image" in text
    assert "Only 1 of 5 questions count in number." in text


def test_a_ratio_without_anything_to_count_in_the_answers_is_no_mistake(data: str) -> None:
    rows = create_task({"type": "chat", "data": data}).rows
    yes = [{**rows[0], "references": [["yes"]]}]
    check_applies("pope_precision", 0, yes, "data")  # the model never said yes
    with pytest.raises(ValueError, match="applies to none of the 1 questions of data: no reference is yes;"):
        check_applies("pope_precision", 0, [{**rows[0], "references": [["no"]]}], "data")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "a.json", "task": "chat"}, "both data and task are given"),
        ({"tasks": ("benchmark",), "metric": "anls"}, "tasks stands beside task, data, metric or generate"),
        ({"tasks": ("benchmark", "benchmark")}, "two tasks are named benchmark; give one a label"),
        ({"hard_subset": 1.0}, "hard_subset is a factor above 1"),
        ({"metric": "cider"}, "torchmetrics has no CIDEr"),
    ],
)
def test_wrong_settings_are_one_line(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        Comparison(**values).check_tasks()
