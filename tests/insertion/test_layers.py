"""Stages at later layers for a block: as if a plan of these layers were attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import tolerance
from gating import Gating
from support import answer_labels, batch, generate, gradients, tiny_model

from tpcompress.insertion.attach import attach, attachment_of, layers, mode, record
from tpcompress.insertion.plan import PruningPlan, Stage

SAMPLES = [(5, 1, 9), (3, 2, 8), (4, 0, 9)]
PLANS: dict[str, tuple[list[tuple[Any, int, int]], list[int]]] = {
    "before the model, then inside": ([("divprune", 0, 30)], [3]),
    "attention of the layer before": ([("fastv", 1, 9)], [4]),
    "attention of the layer behind": ([({"type": "fastv"}, 1, 30), ("tofu", 2, 9)], [2, 5]),
    "several": ([("divprune", 0, 40), ("fastv", 2, 20), ("uniform", 3, 9)], [0, 3, 5]),
    "sizes": ([({"type": "tome"}, 0, 30), ("uniform", 2, 9)], [2, 4]),
    "input": ([("tops", 1, 11)], [3]),
}


def moved(name: str) -> tuple[PruningPlan, PruningPlan, list[int]]:
    """A plan, the same at other layers, and these."""
    stages, to = PLANS[name]
    here = [Stage(rule, layer, keep_tokens=k) for rule, layer, k in stages]
    there = [Stage(rule, at, keep_tokens=k) for (rule, _, k), at in zip(stages, to, strict=True)]
    return PruningPlan(here), PruningPlan(there), to


def results(model: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    with record(model) as trace:
        out = model(**inputs, labels=answer_labels(inputs))
    out.loss.backward()
    found = gradients(model)
    return out.logits.detach(), out.loss.detach(), found, generate(model, inputs).sequences, str(trace)


@pytest.mark.parametrize("name", PLANS)
def test_equal_to_a_plan_of_these_layers(name: str) -> None:
    plan, other, to = moved(name)
    model, expected, inputs = tiny_model(), tiny_model(), batch(SAMPLES)
    attach(model, plan)
    before = results(model, inputs)
    its = results(attach(expected, other), inputs)
    for _ in range(2):
        with layers(model, to):
            ours = results(model, inputs)
        for a, b in zip(ours[:2], its[:2], strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(g, its[2][n]) for n, g in ours[2].items())
        assert torch.equal(ours[3], its[3])
        assert ours[4] == its[4]
        assert ours[4] != before[4], "control"
        again = results(model, inputs)
        assert torch.equal(again[0], before[0]), "behind the block the plan's own layers count"
        assert torch.equal(again[3], before[3])


def test_gates_follow() -> None:
    model, expected, inputs = tiny_model(), tiny_model(), batch(SAMPLES)
    attach(model, PruningPlan([Stage(Gating(), 0, keep_tokens=11)]), mode="mask")
    attach(expected, PruningPlan([Stage(Gating(), 3, keep_tokens=11)]), mode="mask")
    with layers(model, [3]), torch.no_grad():
        found = model(**inputs).logits
    with torch.no_grad():
        assert (found - expected(**inputs).logits).abs().max() < tolerance(model)
        assert (found - model(**inputs).logits).abs().max() > 1e-3, "control"


def test_hooks_are_those_of_the_layers(model: Any) -> None:
    attach(model, PruningPlan([Stage("divprune", 0, keep_tokens=11)]))
    hooks = model._tpcompress
    counts = [len(hooks.layer_handles)]
    with layers(model, [4]):
        counts.append(len(hooks.layer_handles))
    counts.append(len(hooks.layer_handles))
    assert counts == [0, 2, 0]
    with pytest.raises(RuntimeError, match="out"), layers(model, [4]):
        raise RuntimeError("out")
    assert hooks.attachment.settings.layers == (0,)


@pytest.mark.parametrize(
    ("stages", "to", "reason"),
    [
        ([("uniform", 2)], [1], "later layers only"),
        ([("uniform", 2)], [6], "the model has 6"),
        ([("uniform", 2)], [2, 3], "give one each"),
        ([("uniform", 1), ("uniform", 2)], [3, 3], "must rise"),
        ([({"type": "dtd", "level": "pixel"}, 0)], [2], None),
    ],
)
def test_layers_that_cannot_be(model: Any, stages: list[Any], to: list[int], reason: str | None) -> None:
    attach(model, PruningPlan([Stage(rule, at, keep_tokens=9 - i) for i, (rule, at) in enumerate(stages)]))
    before = attachment_of(model).settings.layers
    if reason is None:
        with layers(model, to):
            assert attachment_of(model).settings.layers == tuple(to)
    else:
        with pytest.raises(ValueError, match=reason), layers(model, to):
            pass
    assert attachment_of(model).settings.layers == before


def test_shared_keys_and_views_bound_moves() -> None:
    small = tiny_model("gemma4", "small")
    attach(small, PruningPlan([Stage("uniform", 0, keep_tokens=5)]))
    with pytest.raises(ValueError, match="read the keys of a layer before it"), layers(small, [5]):
        pass
    states = tiny_model("qwen3_5")
    attach(states, PruningPlan([Stage("fastv", 2, keep_tokens=5)]))
    with pytest.raises(ValueError, match="cannot move to layer 4: it needs attention"), layers(states, [4]):
        pass


def test_a_cache_goes_on_with_its_layers(model: Any) -> None:
    attach(model, PruningPlan([Stage("uniform", 1, keep_tokens=9)]))
    inputs = batch([(5, 1, 9)])
    with torch.no_grad():
        with layers(model, [3]):
            cache = model(**inputs, use_cache=True).past_key_values
            word = torch.tensor([[5]])
            model(input_ids=word, past_key_values=cache)
        with pytest.raises(ValueError, match="cut at layer 3, but the stages act at"):
            model(input_ids=word, past_key_values=cache)
        with mode(model, "off"):
            model(**inputs)
