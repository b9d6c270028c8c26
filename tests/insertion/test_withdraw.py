"""Withdrawal: from one layer on, no vision token is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import check, tolerance
from reference import row_positions
from structure import cases, named, plans
from subjects import Subject, lent, ragged, recomputes
from support import (
    PLACEHOLDER,
    TOKENS,
    alone,
    answer_labels,
    batch,
    generate,
    gradients,
    logit_gap,
    new_tokens,
)
from transformers import DynamicCache

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, budgets, detach, mode, record
from tpcompress.insertion.plan import Budget, PruningPlan, Stage

QUICK = ("llava-clip_vision_model", "qwen2_vl", "qwen3_vl", "gemma3", "internvl-qwen2")
"""Plain, M-RoPE, DeepStack, blocks and windows, tiles."""
quick_plans = ("stage 0, original", "last, compact")
PLANS = {
    "stage 0": [Stage("vtw", 0, keep_tokens=0)],
    "layer 2": [Stage("vtw", 2, keep_tokens=0)],
    "last": [Stage("divprune", 0, keep_ratio=0.5), Stage("uniform", 2, keep_tokens=9), Stage("vtw", 4, keep_tokens=0)],
}


@pytest.fixture(params=cases(named(*QUICK)))
def subject(request: pytest.FixtureRequest) -> Any:
    yield from lent(request.param)


@plans(PLANS, *quick_plans, on=QUICK)
def test_equals_the_reference(subject: Subject, name: str, positions: str) -> None:
    plan = subject.plan(PLANS[name], positions=positions)
    modes = ("mask",) if subject.hides else ()
    for inputs in (
        subject.batch(*ragged(subject)),
        subject.batch(*ragged(subject), side="right"),
        subject.batch((5, subject.kinds, 7)),
    ):
        check(subject.model, subject.base, plan, inputs, modes=modes)
        detach(subject.model)


def test_only_words_and_separators_are_left(subject: Subject) -> None:
    inputs = subject.batch((5, subject.kinds, 7))
    attach(subject.model, subject.plan(PLANS["layer 2"]))
    with record(subject.model) as trace, torch.no_grad():
        cache = subject.model(**inputs, use_cache=True).past_key_values
    (stage,) = trace.stages
    tokens = sum(map(len, row_positions(inputs["input_ids"], stage, resolve(subject.base).placeholder_ids)))
    assert stage.vision_in == stage.total
    assert sum(stage.total) == tokens
    assert stage.vision_out == [0] * len(stage.total)
    assert not stage.retained_RV.any()
    assert stage.sequence_out == inputs["input_ids"].shape[1] - tokens
    assert f"vision tokens {tokens} -> 0" in str(trace)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1], "a cache stands for the whole conversation"


@plans(PLANS, *quick_plans, on=QUICK)
def test_cached_equals_recomputed(subject: Subject, name: str, positions: str) -> None:
    samples = [(5, 1, 7), (3, subject.kinds, 8), (4, 0, 9)]
    inputs = subject.batch(*samples)
    plain = generate(subject.model, inputs, new=4)
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    cached = generate(subject.model, inputs, new=4)
    if recomputes(subject, inputs):
        assert logit_gap(cached, generate(subject.model, inputs, new=4, use_cache=False)) < tolerance(subject.model)
    static = generate(subject.model, inputs, new=4, cache_implementation="static", disable_compile=True)
    assert logit_gap(cached, static) < tolerance(subject.model)
    if subject.hides:
        with mode(subject.model, "mask"):
            assert logit_gap(cached, generate(subject.model, inputs, new=4)) < tolerance(subject.model)
    assert logit_gap(cached, plain) > 0.05, "control: withdrawing must change the logits"
    if positions == "original":
        for b in range(len(samples)):
            single = generate(subject.model, alone(inputs, samples, b, subject.case[0], subject.config), new=4)
            gap = max((x[0] - y[b]).abs().max().item() for x, y in zip(single.logits, cached.logits, strict=True))
            assert gap < tolerance(subject.model)
            assert torch.equal(new_tokens(single, 4)[0], new_tokens(cached, 4)[b])


@pytest.mark.parametrize("name", PLANS)
def test_a_new_picture_continues(subject: Subject, name: str) -> None:
    """Words, image, words, image, from a cache and at once."""
    turns = [subject.batch((5, 1, 7)), subject.batch((3, 1, 4), seed=5)]
    ids = torch.cat([turn["input_ids"] for turn in turns], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | subject.family.tiny.arguments(
        subject.config, ids
    )
    pictures = {k for turn in turns for k in turn} - set(whole)
    dim = 1 if subject.family.splits_tiles else 0
    whole |= {k: torch.cat([turn[k] for turn in turns], dim) for k in pictures}
    blocks = subject.family.blocks
    numbers = None if blocks is None else blocks.ids(subject.config, whole)
    if numbers is not None and bool((numbers[:, 0] >= 0).any()):
        pytest.skip("a prefix-LM")
    length, seen = turns[0]["input_ids"].shape[1], []
    attach(subject.model, subject.plan(PLANS[name]))
    hook = resolve(subject.model).language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True, prepend=True
    )
    with torch.no_grad():
        expected = subject.model(**whole)
        hook.remove()
        second = turns[1] | {"attention_mask": whole["attention_mask"]}
        if subject.family.positions == "mrope":
            second["position_ids"] = seen[0][..., length:]
        if blocks is not None:
            second |= subject.family.tiny.arguments(subject.config, ids)
        cache = subject.model(**turns[0], use_cache=True).past_key_values
        out = subject.model(**second, past_key_values=cache)
    gap = (out.logits - expected.logits[:, -out.logits.shape[1] :]).abs().max()
    assert gap < tolerance(subject.model)


def test_a_loss_trains_what_stands_before(subject: Subject) -> None:
    """The gradient reaches the image through the words of the layers before; at layer 0 nothing is left to train."""
    inputs = subject.batch((5, 1, 7), (3, 2, 8))
    labels = answer_labels(inputs)
    reached = []
    for layer in (2, 0):
        attach(subject.model, subject.plan([Stage("vtw", layer, keep_tokens=0)]))
        subject.model(**inputs, labels=labels).loss.backward()
        named = gradients(subject.model)
        tower = [g for n, g in named.items() if ("vis" in n or "projector" in n) and "language_model" not in n]
        reached.append(sum(g.abs().sum().item() for g in tower))
        detach(subject.model)
    assert reached[0] > 0 == reached[1]


def test_beams_equal_recomputation(model: Any) -> None:
    inputs = batch([(5, 1, 7), (3, 2, 8)])
    attach(model, PruningPlan([Stage("vtw", 2, keep_tokens=0)]))
    runs = [generate(model, inputs, new=3, use_cache=c, num_beams=3) for c in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)


def test_a_cache_can_be_used_again(model: Any) -> None:
    attach(model, PruningPlan([Stage("vtw", 0, keep_tokens=0)]))
    cache = DynamicCache(config=model.config.get_text_config())
    for seed in (1, 2):
        inputs = batch([(5, 1, 7)], seed=seed)
        expected = generate(model, inputs, new=3)
        cache.reset()
        assert torch.equal(generate(model, inputs, new=3, past_key_values=cache).sequences, expected.sequences)


def test_a_prompt_of_nothing_else_is_refused(model: Any) -> None:
    pixels = batch([(5, 1, 7)])["pixel_values"]
    attach(model, PruningPlan([Stage("vtw", 2, keep_tokens=0)]))
    with pytest.raises(ValueError, match="add words to the prompt"):
        model(input_ids=torch.full((1, TOKENS), PLACEHOLDER), pixel_values=pixels)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [{"pruner": "vtw", "keep_tokens": 1}],
            "retains nothing, got a budget of 1 tokens; write keep_tokens: 0",
        ),
        ([{"pruner": "vtw", "keep_ratio": 0.5}], "'vtw' retains nothing, got a budget of 0.5 of the tokens"),
        ([{"pruner": "dart", "keep_tokens": 0}], "'dart': keep_tokens must be a whole number of at least 1, got 0"),
        ([{"pruner": "dart", "keep_tokens": -1}], "whole number of at least 1, got -1"),
        (
            [{"pruner": "vtw", "keep_tokens": 0}, {"pruner": "vtw", "layer": 2, "keep_tokens": 0}],
            r"Stage 1 has no tokens to choose from: stage 0 \('vtw'\) drops all of them; make that the last stage",
        ),
    ],
)
def test_plans_that_are_refused(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PruningPlan.from_dict({"stages": stages})
    assert "\n" not in str(error.value)


def test_arithmetic_of_a_plan() -> None:
    plan = PruningPlan([Stage("uniform", 1, keep_tokens=8), Stage("vtw", 4, keep_tokens=0)])
    assert plan.counts(64) == [8, 0]
    assert plan.layer_average(64, 8) == (64 + 3 * 8) / 8
    assert PruningPlan.from_yaml(plan.to_yaml()).to_dict() == plan.to_dict()
    assert PruningPlan.of("recipes/free/vtw.yaml").layer_average(576, 32) == 270


def test_a_budget_of_a_run_is_checked_like_that_of_a_plan(model: Any) -> None:
    attach(model, PruningPlan([Stage("uniform", 2, keep_tokens=8)]))
    with budgets(model, [Budget(keep_tokens=0)]), pytest.raises(ValueError, match="a whole number of at least 1"):
        model(**batch([(5, 1, 7)]))
