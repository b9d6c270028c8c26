"""Which model a harness runs: plans on a command line, exports with another budget or plan, pixels of a processor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpcompress.evaluation.results.model_of import model_of
from tpcompress.export import export
from tpcompress.harness.served import ModelSettings, Served, plan_text, read_plan, with_pixels
from tpcompress.insertion.attach import attach
from tpcompress.models import load_base, load_processor


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("divprune:1/9", "divprune:0.111111@0"),
        ("divprune:0.25@0+dart:64@2", "divprune:0.25@0+dart:64@2"),
        ("'divprune:0.25@0,dart:64@2'", "divprune:0.25@0+dart:64@2"),
    ],
)
def test_plans_on_a_command_line(text: str, stages: str) -> None:
    assert plan_text(read_plan(text)) == stages
    found = model_of({"pretrained": "tiny_llava", "plan": text.strip("'")}, "tpcompress")
    last = read_plan(text).stages[-1]
    assert (found.arm, found.layer) == ("training_free", last.layer)
    assert plan_text(read_plan("vtw:paper")).startswith("vtw:0@")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base: Any = load_base("tiny_llava").eval()
    out = tmp_path_factory.mktemp("served") / "exported"
    export(attach(base, "divprune", keep_tokens=16), load_processor("tiny_llava"), out)
    return out


@pytest.mark.parametrize(
    ("changes", "plan", "row"),
    [
        ({}, "divprune:16@0", ("training_free", "divprune", 16)),
        ({"keep_tokens": 9}, "divprune:9@0", ("training_free", "divprune", 9)),
        ({"keep_ratio": "1/4"}, "divprune:0.25@0", ("training_free", "divprune", 0.25)),
        ({"plan": "dart:36@1"}, "dart:36@1", ("training_free", "dart", 36)),
        ({"dense": True}, None, ("dense", None, None)),
    ],
)
def test_exports(exported: Path, changes: dict[str, Any], plan: str | None, row: tuple[Any, ...]) -> None:
    served = Served.load(ModelSettings(str(exported), dtype="float32", device="cpu", **changes))
    assert (None if served.plan is None else plan_text(served.plan)) == plan
    assert ("runs dense" in served.description) == (plan is None)
    found = model_of({"pretrained": str(exported)} | {key: str(value) for key, value in changes.items()}, "tpcompress")
    assert (found.arm, found.pruner, found.keep_tokens) == row


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_tokens": "0.5"}, "is not a count"),
        ({"keep_ratio": "64"}, "is not a ratio"),
        ({"keep_tokens": "8+4"}, "The plan has 1 stage, got 2 budgets"),
        ({"keep_tokens": 8, "keep_ratio": 0.5}, "exclude each other"),
    ],
)
def test_impossible_budgets(exported: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Served.load(ModelSettings(str(exported), device="cpu", **changes))


def test_pixels_are_areas_of_processors_that_keep_the_size() -> None:
    images = SimpleNamespace(size={"shortest_edge": 4, "longest_edge": 100}, merge_size=2)
    processor = SimpleNamespace(image_processor=images)
    assert with_pixels(processor, None, 50) is processor
    assert images.size == {"shortest_edge": 4, "longest_edge": 50}
    with pytest.raises(ValueError, match="min_pixels 60 is above max_pixels 50"):
        with_pixels(processor, 60, None)
    fixed = SimpleNamespace(image_processor=SimpleNamespace(size={"height": 32, "width": 32}))
    with pytest.raises(ValueError, match="processors that keep the size"):
        with_pixels(fixed, 4, None)
