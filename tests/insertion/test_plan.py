"""Plans: validation, arithmetic, and both ways to text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpcompress.insertion.budget import amount_text
from tpcompress.insertion.plan import VERSION, Budget, PruningPlan, Stage


def test_round_trips(tmp_path: Path) -> None:
    """A pruner inside another, and one with parts; each pruner's own arguments are tests/pruners/test_contract.py."""
    gate = {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}, "reserve": 4}
    merged = {"type": "merged", "metric": "keys", "pruner": {"type": "random", "seed": 3}}
    plan = PruningPlan(
        [Stage(gate, 0, keep_ratio=0.5), Stage(merged, 3, keep_tokens=7)], positions="compact", scope="prompt"
    )
    values = plan.to_dict()
    assert values["version"] == VERSION
    assert json.loads(plan.to_json()) == values
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    (tmp_path / "plan.json").write_text(plan.to_json())
    for again in (
        PruningPlan.from_dict(values),
        PruningPlan.from_yaml(plan.to_yaml()),
        PruningPlan.from_json(plan.to_json()),
        PruningPlan.from_yaml(plan.to_json()),
        PruningPlan.of(tmp_path / "plan.yaml"),
        PruningPlan.of(str(tmp_path / "plan.json")),
    ):
        assert again.to_dict() == values
        assert again.positions == "compact"
        assert again.scope == "prompt"
        assert again.stages[1].layer == 3
    assert PruningPlan.from_dict(values).to_dict() == values, "reading must not change what was given"


def test_one_stage_shorthand() -> None:
    short = PruningPlan.from_yaml("{pruner: dart, layer: 2, keep_tokens: 64, positions: compact}")
    long = PruningPlan([Stage("dart", 2, keep_tokens=64)], positions="compact")
    assert short.to_dict() == long.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 3, "pruner": "dart", "keep_tokens": 1}, "has version 3, this tpcompress reads 1"),
        ({"pruner": "dart", "keep_tokens": 1, "colour": "red"}, "Unknown plan key 'colour'; known: stages"),
        ({"stages": [{"pruner": "dart", "keep_tokens": 1, "layr": 2}]}, "Unknown stage key 'layr'; known: pruner"),
        ({"stages": []}, "at least one stage"),
        ({"stages": None}, "list"),
        ({"stages": {"pruner": "dart", "keep_tokens": 3}}, "list"),
        ({"stages": [{"layer": 2, "keep_tokens": 1}]}, "mapping with `pruner`"),
        ({"stages": ["dart"]}, "mapping with `pruner`"),
        ({}, "mapping with `pruner`"),
        ([], "A plan is a mapping"),
        (None, "A plan is a mapping"),
        ({"pruner": "dat", "keep_tokens": 1}, "No pruner 'dat'.*Did you mean dart"),
        ({"pruner": {"type": "dart", "pivots": 3}, "keep_tokens": 1}, "it takes vision_pivots"),
        ({"pruner": "dart"}, "exactly one of keep_ratio and keep_tokens, got neither"),
        ({"pruner": "dart", "keep_tokens": 1, "keep_ratio": 0.5}, "exactly one .* got both"),
        ({"pruner": "dart", "keep_ratio": 0}, r"keep_ratio must be in \(0, 1\], got 0"),
        ({"pruner": "dart", "keep_ratio": 1.01}, r"keep_ratio must be in \(0, 1\]"),
        ({"pruner": "dart", "keep_ratio": float("nan")}, r"keep_ratio must be in \(0, 1\]"),
        ({"pruner": "dart", "keep_ratio": True}, r"keep_ratio must be in \(0, 1\]"),
        ({"pruner": "dart", "keep_ratio": "half"}, r"keep_ratio must be in \(0, 1\]"),
        ({"pruner": "dart", "keep_tokens": 0}, "whole number of at least 1"),
        ({"pruner": "dart", "keep_tokens": 2.5}, "whole number of at least 1"),
        ({"pruner": "dart", "keep_tokens": 2, "layer": -1}, "layer must be a whole number of at least 0"),
        ({"pruner": "dart", "keep_tokens": 2, "layer": 1.5}, "layer must be a whole number"),
        ({"pruner": "dart", "keep_tokens": 2, "positions": "gone"}, "positions must be one of original, compact"),
        ({"pruner": "dart", "keep_tokens": 2, "scope": "video"}, "scope must be one of image, tile, prompt"),
    ],
)
def test_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PruningPlan.from_dict(values)
    assert "\n" not in str(error.value)


def test_stages_must_rise_and_never_grow() -> None:
    with pytest.raises(ValueError, match="Stage 1 acts at layer 2 after stage 0 at layer 2; layers must increase"):
        PruningPlan([Stage("dart", 2, keep_tokens=9), Stage("random", 2, keep_tokens=3)])
    with pytest.raises(ValueError, match="layers must increase"):
        PruningPlan([Stage("dart", 3, keep_tokens=9), Stage("random", 2, keep_tokens=3)])
    with pytest.raises(
        ValueError, match=r"Stage 1 \(layer 3\) keeps 10 .* after stage 0 kept 9; budgets must not grow"
    ):
        PruningPlan([Stage("dart", 2, keep_tokens=9), Stage("random", 3, keep_tokens=10)])
    with pytest.raises(ValueError, match="budgets must not grow"):
        PruningPlan([Stage("dart", 2, keep_ratio=0.2), Stage("random", 3, keep_ratio=0.3)])
    with pytest.raises(ValueError, match="budgets must not grow"):
        PruningPlan(
            [Stage("dart", 2, keep_tokens=9), Stage("uniform", 3, keep_ratio=0.1), Stage("random", 4, keep_tokens=10)]
        )
    PruningPlan([Stage("dart", 2, keep_ratio=0.2), Stage("random", 3, keep_ratio=0.2)])


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No plan at .*none.yaml; give a pruner with a budget, PRUNER"):
        PruningPlan.of(tmp_path / "none.yaml")


@pytest.mark.parametrize(("ratio", "tokens", "count"), [(0.111, 576, 64), (0.25, 64, 16), (0.001, 64, 1), (1.0, 7, 7)])
def test_ratio_is_rounded_in_one_place(ratio: float, tokens: int, count: int) -> None:
    assert Budget(keep_ratio=ratio).count(tokens) == count


@pytest.mark.parametrize(
    ("amount", "text"),
    [(64, "64"), (1 / 9, "1/9"), (2 / 3, "2/3"), (0.25, "0.25"), (0.111, "0.111"), (0.1111, "0.111"), (1.0, "1")],
)
def test_amounts_are_short(amount: float, text: str) -> None:
    assert amount_text(amount) == text


def test_counts_and_layer_average() -> None:
    plan = PruningPlan(
        [Stage("uniform", 0, keep_ratio=0.5), Stage("dart", 2, keep_tokens=400), Stage("random", 4, keep_tokens=8)]
    )
    assert plan.counts(64) == [32, 32, 8]
    assert plan.counts(4) == [2, 2, 2]
    assert plan.layer_average(64, 6) == (4 * 32 + 2 * 8) / 6
    assert PruningPlan([Stage("dart", 2, keep_tokens=16)]).layer_average(64, 4) == (2 * 64 + 2 * 16) / 4


def test_who_reads_the_prompt() -> None:
    def plan(pruner: Any, layer: int = 0) -> PruningPlan:
        return PruningPlan([Stage(pruner, layer, keep_tokens=4)])

    assert not plan("divprune").prompt_dependent
    assert plan("fastv", 2).prompt_dependent
    assert plan("fastv", 2).reads_prompt
    assert not plan("divprune", 2).reads_prompt
    assert plan({"type": "learned_gate", "scorer": {"type": "local_global", "question": True}}).reads_prompt
    assert not plan("learned_gate").reads_prompt
    assert not plan({"type": "dart", "text_pivots": 0}, 2).reads_prompt
