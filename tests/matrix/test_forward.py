"""One forward call in every class: what is not pruned is untouched, what is pruned equals the reference."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from exact import check, tolerance
from structure import each_family, plans
from subjects import Subject
from support import alone, generate, tiny_model
from ways import ways

from tpcompress.insertion.attach import attach, detach, mode, record
from tpcompress.insertion.plan import Stage

PLANS = {
    "stage 0": [Stage("uniform", 0, keep_ratio=0.5)],
    "layer 2": [Stage("divprune", 2, keep_ratio=0.25)],
    "three": [
        Stage("divprune", 0, keep_ratio=0.6),
        Stage("uniform", 2, keep_ratio=0.3),
        Stage("random", 4, keep_ratio=0.1),
    ],
    "merge": [Stage("pool", 0, keep_ratio=0.4), Stage("pool", 3, keep_ratio=0.2)],
}
LEFT = [(5, 2, 7), (9, 2, 8)]


def ragged(subject: Subject) -> list[Any]:
    """One image, two, none, and every kind that the family knows: each sample loses another number of tokens."""
    return [(5, 1, 7), (3, 2, 8), (4, 0, 9), (6, subject.kinds, 4)]


def logits(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


@plans(PLANS, "three, compact", "merge, original", every_family=["three, compact"])
@ways("drop forward", "mask forward")
def test_equals_the_reference(subject: Subject, name: str, positions: str) -> None:
    """A ragged batch padded on the left, and one sample alone."""
    plan = subject.plan(PLANS[name], positions=positions)
    modes = ("mask",) if subject.hides else ()
    for inputs in (subject.batch(*ragged(subject)), subject.batch((5, subject.kinds, 7))):
        check(subject.model, subject.base, plan, inputs, modes=modes)
        detach(subject.model)


@plans(PLANS)
def test_other_batches_equal_the_reference(subject: Subject, name: str, positions: str) -> None:
    """Samples of one length, and padding on the right."""
    plan = subject.plan(PLANS[name], positions=positions)
    modes = ("mask",) if subject.hides else ()
    for inputs in (subject.batch(*LEFT), subject.batch(*ragged(subject), side="right")):
        check(subject.model, subject.base, plan, inputs, modes=modes)
        detach(subject.model)


@ways("drop forward", plan="several")
def test_one_budget_for_a_prompt(subject: Subject) -> None:
    plan = subject.plan(PLANS["three"], scope="prompt")
    check(subject.model, subject.base, plan, subject.batch(*ragged(subject)), modes=())


@ways("drop forward", plan="input")
@ways("drop forward", plan="several")
def test_without_any_mask(subject: Subject) -> None:
    inputs = subject.batch((5, subject.kinds, 7))
    del inputs["attention_mask"]
    for name in ("stage 0", "three"):
        check(subject.model, subject.base, subject.plan(PLANS[name]), inputs, modes=())
        detach(subject.model)


def test_keeping_everything_is_bit_identical(subject: Subject) -> None:
    model, inputs = subject.model, subject.batch(*ragged(subject))
    before, sequences = logits(model, inputs), generate(model, inputs, new=3).sequences
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(vars(model))
    attach(model, subject.plan([Stage("pool", 0, keep_ratio=1.0), Stage("uniform", 2, keep_tokens=999)]))
    for name in ("drop", "mask", "off"):
        with mode(model, name):
            assert torch.equal(logits(model, inputs), before)
            assert torch.equal(generate(model, inputs, new=3).sequences, sequences)
    detach(model)
    assert set(vars(model)) == attributes
    assert torch.equal(logits(model, inputs), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_text_only_batch_is_bit_identical(subject: Subject) -> None:
    model, inputs = subject.model, subject.batch((5, 0, 7), (3, 0, 4))
    before, sequences = logits(model, inputs), generate(model, inputs, new=3).sequences
    for positions in ("original", "compact"):
        attach(model, subject.plan(PLANS["three"], positions=positions))
        with record(model) as trace:
            assert torch.equal(logits(model, inputs), before)
            assert torch.equal(generate(model, inputs, new=3).sequences, sequences)
        assert trace.stages == []
        assert str(trace) == "no vision token was pruned"
        detach(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_sample_of_a_batch_equals_the_sample_alone(subject: Subject, side: str) -> None:
    samples = ragged(subject)
    inputs = subject.batch(*samples, side=side)
    if subject.family.reads_positions(subject.config):  # otherwise padding would count
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for name in ("stage 0", "three"):
        attach(subject.model, subject.plan(PLANS[name]))
        together = logits(subject.model, inputs)
        for b in range(len(samples)):
            single = logits(subject.model, alone(inputs, samples, b, subject.case[0], subject.config))
            # Whatever the side of the caller's padding, what is left stands at the right.
            assert (together[b, -single.shape[1] :] - single[0]).abs().max() < tolerance(subject.model)
        detach(subject.model)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "lfm2_vl"])
def test_eager_attention_equals_the_reference(family: str, positions: str) -> None:
    variant = (lambda v: v[0])(Subject((family, ()), None, None).family.tiny.variants)
    model, base = (tiny_model(family, *variant, impl=impl) for impl in ("eager", "eager"))
    subject = Subject((family, variant), model, base)
    plan = subject.plan(PLANS["three"], positions=positions)
    check(model, base, plan, subject.batch(*ragged(subject)), modes=())


def test_hiding_is_refused_where_it_would_not_equal_dropping(subject: Subject) -> None:
    attach(subject.model, subject.plan(PLANS["layer 2"]), mode="mask")
    inputs = subject.batch(*LEFT)
    if subject.hides:
        assert logits(subject.model, inputs).shape[1] == inputs["input_ids"].shape[1]
        return
    with pytest.raises(ValueError, match="Mode mask cannot hide tokens from layers of kind"):
        logits(subject.model, inputs)


def test_packed_positions_without_a_mask_are_refused(subject: Subject) -> None:
    """Two sequences in one row, told apart by positions that start again: dropping tokens makes such gaps anywhere."""
    inputs = subject.batch((5, 1, 7))
    del inputs["attention_mask"]
    S = inputs["input_ids"].shape[1]
    rows = torch.cat([torch.arange(S - 6), torch.arange(6)])[None]
    if subject.family.positions == "mrope":
        rows = rows.expand(4, 1, S)
    attach(subject.model, subject.plan(PLANS["stage 0"]))
    with pytest.raises(ValueError, match="read as packed sequences"):
        logits(subject.model, inputs, position_ids=rows)


@each_family()
def test_load_balancing_loss_is_refused(subject: Subject) -> None:
    inputs = subject.batch((5, 1, 7))
    if "output_router_logits" not in inspect.signature(type(subject.base).forward).parameters:
        pytest.skip("no experts")
    attach(subject.model, subject.plan(PLANS["layer 2"]))
    with pytest.raises(ValueError, match="leave it off while a plan is attached"):
        logits(subject.model, inputs, output_router_logits=True)
