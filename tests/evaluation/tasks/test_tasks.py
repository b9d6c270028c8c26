"""Tasks: found by being there, made of plain values, known by the content of their rows."""

import json

import datasets
import numpy as np
import pytest

import tpcompress as tp
from tpcompress.data.blank import blank_images
from tpcompress.evaluation.scoring.batches import questions_of
from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.evaluation.tasks import create_task, list_tasks


def write_chat(folder, rows, answer: str = "red", **fields):
    """Three images with a question each, as LLaVA's JSON; `fields` of every record, each with a value per record."""
    records = []
    for number in range(3):
        rows[number]["images"][0].save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": answer}]
        more = {name: values[number] for name, values in fields.items() if values[number] is not None}
        records.append({"id": number, "image": f"{number}.png", "conversations": turns} | more)
    path = folder / "chat.json"
    path.write_text(json.dumps(records))
    return path


def test_a_task_is_found_and_made_from_its_config():
    assert {"benchmark", "chat"} <= set(list_tasks())
    task = create_task({"type": "benchmark", "num_images": 3, "seed": 1})
    assert task.config() == {"type": "benchmark", "num_images": 3, "seed": 1, "split": "test"}
    assert create_task(task.config()).fingerprint == task.fingerprint
    assert create_task(task) is task
    assert create_task("benchmark").num_images == 320


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("benchmrk", "No task 'benchmrk'; known: benchmark, chat.*Did you mean benchmark"),
        ({"num_images": 3}, "A task is a name or a mapping with `type`"),
        ({"type": "benchmark", "images": 3}, "has no argument images; it takes num_images, seed, split"),
        ({"type": "benchmark", "num_images": 0}, "at least 1, got 0"),
        ({"type": "benchmark", "seed": "one"}, "seed must be a whole number, got 'one'"),
        ({"type": "chat"}, "missing 1 required .* 'data'; it takes data, image_folder"),
    ],
)
def test_a_wrong_task_is_one_line(config, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        create_task(config)


def test_the_fingerprint_is_that_of_the_content(tmp_path, rows):
    kinds = [("benchmark", 3, 0), ("benchmark", 4, 0), ("benchmark", 3, 1)]
    prints = [create_task({"type": t, "num_images": n, "seed": s}).fingerprint for t, n, s in kinds]
    assert len(set(prints)) == 3
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    same, other = write_chat(folders[0], rows), write_chat(folders[1], rows, "blue")
    assert create_task({"type": "chat", "data": str(same)}).fingerprint == chat_print(write_chat(folders[2], rows))
    assert chat_print(same) != chat_print(other)
    before = chat_print(same)
    rows[5]["images"][0].save(folders[0] / "1.png")  # another image under the same name
    assert chat_print(same) != before


def chat_print(path) -> str:
    return create_task({"type": "chat", "data": str(path)}).fingerprint


def test_chat_rows_without_families_are_one_family(vqa, processor, rows, tmp_path):
    task = create_task({"type": "chat", "data": str(write_chat(tmp_path, rows)), "num_images": 2})
    assert [row["families"] for row in task.rows] == [["all"], ["all"]]
    scores = task.score(vqa, processor)
    assert (scores.names, scores.num_images) == (("all",), 2)


@pytest.mark.parametrize("fields", [{"family": ["a", None, "b"]}, {"families": [["a"], None, ["b"]]}])
@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_chat_rows_have_the_families_of_their_records(rows, tmp_path, fields, ending):
    path = write_chat(tmp_path, rows, **fields)
    if ending == "parquet":
        columns = {name: [] for name in ("image", "conversations", *fields)}
        for record in json.loads(path.read_text()):
            for name, column in columns.items():
                column.append(record.get(name))
        path = tmp_path / "chat.parquet"
        datasets.Dataset.from_dict(columns).to_parquet(str(path))
    task = create_task({"type": "chat", "data": str(path)})
    assert [row["families"] for row in task.rows] == [["a"], ["all"], ["b"]]


def test_a_record_with_too_many_families_is_left_out(rows, tmp_path):
    task = create_task({"type": "chat", "data": str(write_chat(tmp_path, rows, families=[["a"], ["a", "b"], ["b"]]))})
    assert [row["families"] for row in task.rows] == [["a"], ["b"]]


@pytest.mark.parametrize("pack", [True, False])
def test_a_task_scores_as_evaluate_does(vqa, processor, pack):
    task = create_task({"type": "benchmark", "num_images": 6})
    model = tp.attach(vqa, tp.PruningPlan([tp.Stage("divprune", keep_tokens=9)]))
    for blank in (False, True):
        prepared = task.prepare(processor, 5, pack, blank_images if blank else None)
        assert prepared.packed == pack
        found = task.score(model, processor, prepared)
        expected = evaluate(model, processor, task.rows, pack=pack, blank=blank)
        assert found.families == pytest.approx(expected.families, nan_ok=True)
        np.testing.assert_array_equal(found.count_IF, expected.count_IF)


@pytest.mark.parametrize(
    ("columns", "references"),
    [
        ({"answers": ["red", "a red car"]}, [["red", "a red car"]]),
        ({"references": [["red"]]}, [["red"]]),
        ({"answers": [{"answer": "red"}, {"answer": "blue"}]}, [["red", "blue"]]),
        ({"answers": "red"}, [["red"]]),
        ({}, None),
    ],
)
def test_chat_rows_have_the_right_answers_of_their_records(tmp_path, columns, references):
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": turns, **columns}]))
    task = create_task({"type": "chat", "data": str(tmp_path / "chat.json")})
    assert task.rows[0]["references"] == references
    (asked,) = questions_of(task.rows[0])
    assert asked.references == tuple(references[0] if references else ["red"])


def test_questions_with_answers_alone_are_rows(tmp_path):
    records = [{"question": "what ?", "answers": ["blue", "red", "red"]}]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    task = create_task({"type": "chat", "data": str(tmp_path / "chat.json")})
    assert task.rows[0]["conversations"][0][-1]["content"] == "red"
    assert task.rows[0]["references"] == [["blue", "red", "red"]]
