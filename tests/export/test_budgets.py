"""A budget is an argument of loading, and an export of many budgets is checked at several."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import answer, make_base
from export.test_verify import forget
from safetensors.torch import load_file, save_file

import tpcompress as tp
from tpcompress.export import VerifyReport, load, verify


def counts(*tokens: int) -> list[tp.Budget]:
    return [tp.Budget(keep_tokens=n) for n in tokens]


@pytest.fixture(scope="module")
def any_budget(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage of 16 of 64 tokens that was trained with 4 to 32."""
    model = tp.attach(make_base(), tp.PruningPlan([tp.Stage("divprune", keep_tokens=16)]))
    out = tmp_path_factory.mktemp("any") / "out"
    return tp.export(model, processor, out, trained_budgets=[(tp.Budget(keep_tokens=4), tp.Budget(keep_ratio=0.5))])


def test_a_budget_to_load_with(exported: Path, tmp_path: Path, inputs: dict[str, torch.Tensor]) -> None:
    own, other = load(exported), load(exported, keep_tokens=[20, 3], verify=True)
    with tp.budgets(own, counts(20, 3)), tp.record(own) as trace:
        wanted = answer(own, inputs)
    assert [stage.vision_out for stage in trace.stages[:2]] == [[20, 20], [3, 3]]
    assert all(torch.equal(a, b) for a, b in zip(answer(other, inputs), wanted, strict=True))
    assert not torch.equal(answer(own, inputs)[0], wanted[0])
    assert [stage.keep_tokens for stage in tp.plan_of(other).stages] == [20, 3]
    other.save_pretrained(tmp_path)
    assert [stage.keep_tokens for stage in tp.plan_of(load(tmp_path)).stages] == [20, 3]
    assert [s.keep_ratio for s in tp.plan_of(load(exported, keep_ratio=(0.5, 0.25))).stages] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"keep_tokens": 9}, "The plan has 2 stages, got 1 budget; give one each"),
        ({"keep_tokens": [9, 0]}, "Pruner 'divprune': keep_tokens must be a whole number of at least 1, got 0"),
        ({"keep_tokens": [9.5, 2]}, "keep_tokens must be a whole number of at least 1, got 9.5"),
        ({"keep_tokens": [9, 12]}, "budgets must not grow"),
        ({"keep_ratio": [1.5, 0.1]}, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"keep_tokens": [9, 3], "keep_ratio": 0.5}, "Both keep_tokens and keep_ratio are given; give one of them"),
    ],
)
def test_impossible_budgets_are_one_line(asked: dict[str, Any], words: str, exported: Path) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
        load(exported, **asked)


def test_the_range_of_training_is_written_and_replayed(any_budget: Path) -> None:
    manifest = json.loads((any_budget / "manifest.json").read_text())
    assert manifest["trained_budgets"] == [
        {"low": {"keep_tokens": 4}, "high": {"keep_ratio": 0.5}, "retained": [4, 32]}
    ]
    report = verify(any_budget)
    assert {budget: found.stages[0].retained for budget, found in report.others.items()} == {
        "4 tokens": 4,
        "0.5 of the tokens": 32,
    }
    assert report.ok
    assert "(16 of 64 in the probe, also at 4 tokens and 0.5 of the tokens)" in str(report)


def test_a_difference_at_another_budget_is_found(any_budget: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(any_budget, tmp_path / "folder"))
    tensors = load_file(folder / "probe.tensors")
    retained = tensors["other.1.stage.0.retained"]
    tensors["other.1.stage.0.retained"] = retained.flip(-1)
    assert not torch.equal(retained, retained.flip(-1))
    save_file(tensors, folder / "probe.tensors")
    forget(folder)
    report = verify(folder)
    assert isinstance(report, VerifyReport)
    assert not report.ok
    line = str(report)
    assert line.startswith(
        "At 0.5 of the tokens the export differs from the exported model first at stage 0 (layer 0): "
    )
    assert "\n" not in line


def test_ends_that_keep_what_the_plan_keeps_are_not_stored_twice(processor: Any, base: Any, tmp_path: Path) -> None:
    model = tp.attach(base, tp.PruningPlan([tp.Stage("divprune", keep_tokens=16)]))
    same = (tp.Budget(keep_tokens=16), tp.Budget(keep_ratio=0.25))
    out = tp.export(model, processor, tmp_path / "out", trained_budgets=[same])
    assert verify(out).others == {}
    with pytest.raises(ValueError, match="1 stage, got 2 ranges of budgets"):
        tp.export(model, processor, tmp_path / "two", trained_budgets=[same, same])


def test_a_probe_of_one_budget_is_still_read(folder: Path) -> None:
    probe = json.loads((folder / "probe.json").read_text())
    assert probe.pop("others") == []
    del probe["budgets"]
    (folder / "probe.json").write_text(json.dumps(probe))
    forget(folder)
    assert verify(folder).ok


def test_a_budget_that_was_not_trained_is_said(any_budget: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tpcompress"):
        load(any_budget, keep_tokens=4)
        load(any_budget, keep_ratio=0.5)
        assert caplog.messages == []
        load(any_budget, keep_tokens=3)
    assert caplog.messages == ["Loaded with 3 tokens, but trained at 4 tokens to 0.5 of the tokens."]
