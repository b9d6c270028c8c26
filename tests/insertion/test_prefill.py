"""One forward call of LLaVA: further plans, batches and arguments. What every class needs is in tests/matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import check
from support import (
    PLACEHOLDER,
    TOKENS,
    answer_labels,
    batch,
    every_placed,
    generate,
    one_sample,
    placed_configs,
)

from tpcompress.insertion.attach import attach, budgets, detach, mode, record
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.pruners import list_pruners

LEFT = [(5, 2, 7), (9, 2, 8)]
RAGGED = [(5, 1, 7), (3, 2, 8), (4, 0, 9), (6, 3, 4)]
"""One, two, no and three images: every sample loses another number of tokens."""

PLANS = {
    "stage 0": [Stage("uniform", 0, keep_ratio=0.5)],
    "layer 2": [Stage("dart", 2, keep_ratio=0.25)],
    "last layer": [Stage("divprune", 5, keep_tokens=3)],
    "three": [
        Stage("divprune", 0, keep_tokens=40),
        Stage("fastv", 2, keep_tokens=17),
        Stage("random", 4, keep_tokens=5),
    ],
    "merge in the middle": [Stage("random", 0, keep_tokens=40), Stage("pool", 3, keep_ratio=0.2)],
    "adjacent": [
        Stage("uniform", 1, keep_tokens=30),
        Stage("fastv", 2, keep_tokens=20),
        Stage("dart", 3, keep_tokens=7),
    ],
}


def logits(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", PLANS)
def test_plans_equal_the_reference(model: Any, base: Any, name: str, positions: str) -> None:
    check(model, base, PruningPlan(PLANS[name], positions=positions), batch(LEFT))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", PLANS)
def test_ragged_batches_equal_the_reference(model: Any, base: Any, name: str, positions: str) -> None:
    for side in ("left", "right"):
        check(model, base, PruningPlan(PLANS[name], positions=positions), batch(RAGGED, side))
        detach(model)


@every_placed(0, 2)
def test_every_pruner_equals_the_reference(model: Any, base: Any, config: dict[str, Any], layer: int) -> None:
    check(model, base, PruningPlan([Stage(config, layer, keep_tokens=13)]), batch([(5, 1, 7), (3, 2, 8)]))


def test_every_pruner_has_a_place() -> None:
    """No pruner passes the matrices by being left out of them."""
    placed = {config["type"] for config, _ in placed_configs(0, 2)}
    assert placed == {name for name, cls in list_pruners().items() if not cls.keeps_none}


@pytest.mark.parametrize("scope", ["image", "prompt"])
@pytest.mark.parametrize("name", PLANS)
def test_scopes_equal_the_reference(model: Any, base: Any, name: str, scope: str) -> None:
    plan = PruningPlan(PLANS[name], scope=scope)
    check(model, base, plan, batch(RAGGED))
    detach(model)
    check(model, base, plan, one_sample(batch(RAGGED), 3))


def test_keeping_everything_with_views_is_bit_identical(model: Any) -> None:
    inputs = batch(RAGGED)
    before, sequences = logits(model, inputs), generate(model, inputs).sequences
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stages = [
        Stage("pool", 0, keep_ratio=1.0),
        Stage("fastv", 2, keep_tokens=64),
        Stage("learned_gate", 4, keep_ratio=1.0),
    ]
    for name in ("drop", "mask", "off"):
        attach(model, PruningPlan(stages), mode=name)
        assert torch.equal(logits(model, inputs), before)
        assert torch.equal(generate(model, inputs).sequences, sequences)
        detach(model)
    assert torch.equal(logits(model, inputs), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_mode_off_is_bit_identical(model: Any, eager_model: Any, impl: str) -> None:
    model, inputs = (model if impl == "sdpa" else eager_model), batch(LEFT)
    before = logits(model, inputs)
    attach(model, PruningPlan(PLANS["three"]))
    assert logits(model, inputs).shape != before.shape
    with mode(model, "off"):
        assert torch.equal(logits(model, inputs), before)
        assert torch.equal(logits(model, inputs, labels=answer_labels(inputs)), before)


def test_labels_line_up_with_logits(model: Any, base: Any) -> None:
    inputs = batch(RAGGED)
    labels = answer_labels(inputs)
    attach(model, PruningPlan(PLANS["three"]))
    with record(model) as trace, torch.no_grad():
        out = model(**inputs, labels=labels)
    assert trace.labels_BN is not None
    assert trace.labels_BN.shape == out.logits.shape[:2]
    assert torch.equal(trace.labels_BN[:, -4:], labels[:, -4:])
    assert (trace.labels_BN != -100).sum() == (labels != -100).sum()
    shifted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), trace.labels_BN[:, 1:].flatten())
    assert torch.allclose(out.loss, shifted)


def test_labels_given_by_position_or_by_name_are_the_same(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    labels = answer_labels(inputs)
    attach(model, PruningPlan([Stage("fastv", 2, keep_tokens=5)]))
    with torch.no_grad():
        named = model(**inputs, labels=labels).loss
        values = (
            inputs["input_ids"],
            inputs["pixel_values"],
            inputs["attention_mask"],
            None,
            None,
            None,
            None,
            None,
            labels,
        )
        assert torch.equal(model(*values).loss, named)
        assert torch.equal(model(**inputs, labels=labels, return_dict=False)[0], named)


def test_two_losses_of_one_plan_follow_the_reduction_of_the_base(model: Any) -> None:
    inputs = batch(LEFT)
    labels = answer_labels(inputs)
    attach(model, PruningPlan(PLANS["stage 0"]))
    with torch.no_grad():
        mean = model(**inputs, labels=labels).loss
        total = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(1)).loss
    assert torch.allclose(total, mean * (labels != -100).sum())


def test_given_positions_are_kept(model: Any, base: Any) -> None:
    inputs = batch(LEFT)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + 3
    for positions in ("original", "compact"):
        for name in ("stage 0", "three"):
            check(model, base, PruningPlan(PLANS[name], positions=positions), inputs)
            detach(model)


def test_packed_position_ids_without_a_mask_are_refused(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    masked = logits(attach(model, PruningPlan(PLANS["three"])), inputs)
    del inputs["attention_mask"]
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    assert (logits(model, inputs, position_ids=positions) - masked).abs().max() < 1e-5
    positions[:, 40:] -= 40
    with pytest.raises(ValueError, match="position_ids without an attention_mask"):
        model(**inputs, position_ids=positions)


def test_inputs_embeds_equal_input_ids(model: Any) -> None:
    inputs = batch(RAGGED)
    attach(model, PruningPlan(PLANS["three"]))
    expected = logits(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    assert torch.equal(logits(model, given), expected)


def test_already_merged_embeds_are_text_to_us(model: Any, base: Any) -> None:
    embeds = torch.randn(1, 9, model.config.text_config.hidden_size)
    attach(model, PruningPlan(PLANS["three"]))
    assert torch.equal(logits(model, {"inputs_embeds": embeds}), logits(base, {"inputs_embeds": embeds}))


def test_counts_of_images_and_prompts(model: Any) -> None:
    inputs = batch(RAGGED)
    for scope, rows, owners in (("image", [TOKENS] * 6, [0, 1, 1, 3, 3, 3]), ("prompt", [64, 128, 192], [0, 1, 3])):
        attach(model, PruningPlan([Stage("random", 0, keep_ratio=0.5), Stage("fastv", 3, keep_tokens=10)], scope=scope))
        with record(model) as trace:
            logits(model, inputs)
        first, second = trace.stages
        assert first.owner == owners
        assert first.total == first.vision_in == rows
        assert first.vision_out == second.vision_in == [n // 2 for n in rows]
        assert second.vision_out == [10] * len(rows)
        for stage in trace.stages:
            assert stage.retained_RV.sum(1).tolist() == stage.vision_out
        assert (first.retained_RV | ~second.retained_RV).all(), "a later stage cannot bring tokens back"
        assert (first.stage, first.layer, second.stage, second.layer) == (0, 0, 1, 3)
        assert first.sequence_in == inputs["input_ids"].shape[1]
        assert first.sequence_out == second.sequence_in
        assert str(trace).count("stage") == 2
        detach(model)


def test_budgets_for_a_block(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    length = inputs["input_ids"].shape[1]
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=20), Stage("fastv", 2, keep_tokens=10)]))
    with budgets(model, [Budget(keep_ratio=0.5), Budget(keep_tokens=30)]):
        assert logits(model, inputs).shape[1] == length - TOKENS + 30
        with budgets(model, [Budget(keep_ratio=1.0), Budget(keep_ratio=1.0)]):
            assert logits(model, inputs).shape[1] == length
    assert logits(model, inputs).shape[1] == length - TOKENS + 10
    with pytest.raises(ValueError, match="2 stages, got 1"), budgets(model, [Budget(keep_tokens=1)]):
        pass
    with budgets(model, [Budget(keep_tokens=5), Budget(keep_tokens=30)]):
        assert logits(model, inputs).shape[1] == length - TOKENS + 5, "a later stage cannot add tokens"


def test_one_token_left(model: Any, base: Any) -> None:
    check(model, base, PruningPlan([Stage("fastv", 1, keep_tokens=1)]), batch(RAGGED))


def test_image_first_and_image_last(model: Any, base: Any) -> None:
    inputs = batch([(0, 1, 8), (8, 1, 0)])
    for name in ("stage 0", "three"):
        check(model, base, PruningPlan(PLANS[name]), inputs, words=1)
        detach(model)


def test_nested_records_both_see_everything(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    attach(model, PruningPlan(PLANS["three"]))
    with record(model) as outer:
        with record(model) as inner:
            logits(model, inputs)
        logits(model, inputs)
    assert (len(outer.stages), len(inner.stages)) == (6, 3)
    logits(model, inputs)
    assert len(outer.stages) == 6


def test_hidden_states_have_the_length_of_their_layer(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    attach(model, PruningPlan([Stage("uniform", 2, keep_tokens=10)]))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    full = inputs["input_ids"].shape[1]
    assert [h.shape[1] for h in states][:2] == [full, full]
    assert [h.shape[1] for h in states][3:] == [full - TOKENS + 10] * 4


def test_trace_positions_are_those_of_the_pruner(model: Any) -> None:
    """The retained tokens are exactly what the pruner said of the view, for the first stage of each plan."""
    inputs = batch(LEFT)
    assert (inputs["input_ids"] == PLACEHOLDER).sum() == 4 * TOKENS
    for name, stages in PLANS.items():
        attach(model, PruningPlan([replace(stages[0])]))
        with record(model) as trace:
            logits(model, inputs)
        stage = trace.stages[0]
        assert torch.equal(stage.retained_RV, stage.selection.keep_BV), name
        assert torch.equal(stage.view.row_BV * 8 + stage.view.col_BV, torch.arange(TOKENS).expand(4, -1))
        detach(model)
