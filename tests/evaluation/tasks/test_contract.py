"""What every registered task promises, with few rows."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from photo_standins import write_standins
from PIL import Image

from tpcompress.evaluation.scoring.metrics import list_metrics
from tpcompress.evaluation.tasks import Task, create_task, list_tasks

SMALL = {"num_images": 6}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in place of the photographs, which a script fetches."""
    return write_standins(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(params=list_tasks())
def task(request: pytest.FixtureRequest, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("TPCOMPRESS_PHOTOS", str(photographs))
    known = inspect.signature(list_tasks()[request.param]).parameters
    config: dict[str, Any] = {"type": request.param} | {name: SMALL[name] for name in SMALL if name in known}
    if "data" in known:
        turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
        Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
        (tmp_path / "chat.json").write_text(json.dumps([{"id": 0, "image": "a.png", "conversations": turns}]))
        config["data"] = str(tmp_path / "chat.json")
    return create_task(config)


def test_every_conversation_has_a_family(task: Task) -> None:
    assert len(task.rows)
    for index in range(len(task.rows)):
        row = task.rows[index]
        assert row["images"]
        assert len(row["conversations"]) == len(row["families"]) >= 1
        for turns in row["conversations"]:
            assert [turn["role"] for turn in turns[-2:]] == ["user", "assistant"]


def test_its_config_makes_the_same_task(task: Task) -> None:
    again = create_task(json.loads(json.dumps(task.config())))
    assert again.config() == task.config()
    assert again.fingerprint == task.fingerprint
    assert again.description == task.description


def test_its_metric_exists(task: Task) -> None:
    assert task.metric in list_metrics()
    assert task.description
