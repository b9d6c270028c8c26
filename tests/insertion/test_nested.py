"""A pass with larger budgets retains what an earlier one did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import answer_labels, batch, pruner_configs, tiny_model

from tpcompress.insertion.attach import attach, budgets, force_retain, layers, mode, record
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.insertion.trace import Trace
from tpcompress.pruners import create, list_pruners

SAMPLES = [(5, 1, 9), (3, 2, 8), (4, 0, 9)]
SELECTING = [
    name
    for name, cls in list_pruners().items()
    if not (cls.keeps_none or cls().merges or cls().uses_token_sizes)
    and cls().exact_count
    and cls().needs <= {"text", "keys"}
]
LARGER = [Budget(keep_tokens=40), Budget(keep_tokens=21)]


def call(model: Any, inputs: dict[str, Any]) -> Trace:
    with record(model) as trace, torch.no_grad():
        model(**inputs, labels=answer_labels(inputs))
    return trace


@pytest.mark.parametrize("name", SELECTING)
def test_every_retained_token_is_retained_again(name: str) -> None:
    model, inputs = tiny_model(), batch(SAMPLES)
    attach(model, PruningPlan([Stage("random", 0, keep_tokens=30), Stage(name, 2, keep_tokens=9)]))
    student = call(model, inputs)
    with force_retain(model, student), budgets(model, LARGER):
        teacher = call(model, inputs)
    for small, large in zip(student.stages, teacher.stages, strict=True):
        assert not (small.retained_RV & ~large.retained_RV).any()
        assert large.vision_out == large.retained_RV.sum(1).tolist()
    assert [stage.vision_out for stage in teacher.stages] == [[40] * 3, [21] * 3]


def test_the_control() -> None:
    """Without the block another draw retains other tokens."""
    inputs = batch(SAMPLES)
    first, model = (
        attach(tiny_model(), PruningPlan([Stage({"type": "random", "seed": seed}, 0, keep_tokens=20)]))
        for seed in (1, 2)
    )
    student = call(first, inputs)
    with budgets(model, [Budget(keep_tokens=30)]):
        free = call(model, inputs)
        with force_retain(model, student):
            bound = call(model, inputs)
    assert (student.stages[0].retained_RV & ~free.stages[0].retained_RV).any()
    assert not (student.stages[0].retained_RV & ~bound.stages[0].retained_RV).any()
    assert bound.stages[0].retained_RV.sum(1).tolist() == [30] * 3


def test_others_come_by_the_pruners_own_order() -> None:
    model, inputs = tiny_model(), batch(SAMPLES)
    attach(model, PruningPlan([Stage("fastv", 2, keep_tokens=9)]))
    student = call(model, inputs)
    with budgets(model, [Budget(keep_tokens=21)]):
        free = call(model, inputs)
        with force_retain(model, student):
            bound = call(model, inputs)
    assert torch.equal(free.stages[0].retained_RV, bound.stages[0].retained_RV), "a nested choice does not change"
    # Choices of another rule: what is forced, and of the others the best-scored.
    grid = attach(tiny_model(), PruningPlan([Stage("uniform", 2, keep_tokens=9)]))
    other = call(grid, inputs)
    with budgets(model, [Budget(keep_tokens=21)]), force_retain(model, other):
        bound = call(model, inputs)
    stage, forced = bound.stages[0], other.stages[0].retained_RV
    scores = stage.selection.scores_BV.masked_fill(forced, torch.inf)
    assert torch.equal(stage.retained_RV, torch.zeros_like(forced).scatter(1, scores.topk(21).indices, True))


def test_stages_may_have_moved() -> None:
    model, inputs = tiny_model(), batch(SAMPLES)
    attach(model, PruningPlan([Stage("fastv", 1, keep_tokens=9)]))
    student = call(model, inputs)
    with layers(model, [4]), budgets(model, LARGER[1:]), force_retain(model, student):
        teacher = call(model, inputs)
    assert teacher.stages[0].layer == 4
    assert not (student.stages[0].retained_RV & ~teacher.stages[0].retained_RV).any()


def test_in_mode_mask_as_well() -> None:
    model, inputs = tiny_model(), batch(SAMPLES)
    attach(model, PruningPlan([Stage("random", 0, keep_tokens=30), Stage("fastv", 2, keep_tokens=9)]))
    student, found = call(model, inputs), []
    for how in ("drop", "mask"):
        with mode(model, how), force_retain(model, student), budgets(model, LARGER):
            found.append(call(model, inputs).stages[1].retained_RV)
    assert torch.equal(*found)


def test_what_is_refused() -> None:
    inputs, other = batch(SAMPLES), batch([(5, 1, 9)])
    model = attach(tiny_model(), PruningPlan([Stage("uniform", 0, keep_tokens=9)]))
    student = call(model, inputs)
    with force_retain(model, student):
        with budgets(model, [Budget(keep_tokens=8)]), pytest.raises(ValueError, match="larger budgets"):
            call(model, inputs)
        with pytest.raises(ValueError, match="earlier call of this batch"):
            call(model, other)
    with force_retain(model, Trace()), pytest.raises(ValueError, match="record that call"):
        call(model, inputs)
    call(model, other)  # nothing stays behind


def test_pruners_that_change_what_they_retain_are_refused() -> None:
    refused = 0
    for config in pruner_configs():
        rule = create(dict(config))
        if not (rule.merges or rule.uses_token_sizes) or rule.needs - {"text"}:
            continue
        model: Any = attach(tiny_model(), PruningPlan([Stage(rule, 0, keep_tokens=9)]))
        with pytest.raises(ValueError, match="changes the tokens"), force_retain(model, Trace()):
            pass
        refused += 1
    assert refused > 3
    model = attach(tiny_model(), PruningPlan([Stage({"type": "divprune", "compat": True}, 0, keep_tokens=9)]))
    with pytest.raises(ValueError, match="chooses its own count"), force_retain(model, Trace()):
        pass


def test_gates_and_forced_tokens_do_not_go_together() -> None:
    model, inputs = tiny_model(), batch(SAMPLES)
    attach(model, PruningPlan([Stage("learned_gate", 0, keep_tokens=9)]), mode="mask")
    student = call(model, inputs)
    with force_retain(model, student), budgets(model, [Budget(keep_tokens=12)]):
        assert not (student.stages[0].retained_RV & ~call(model, inputs).stages[0].retained_RV).any()
        model.train()
        with pytest.raises(ValueError, match="call model.eval"):
            call(model, inputs)
