"""Pruners that count for themselves: any number from 0 to what is there, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exact import check, tolerance
from subjects import Subject, lent
from support import alone, answer_labels, batch, generate, list_families, logit_gap, new_tokens
from torch import Tensor

from tpcompress.insertion.attach import attach, detach, mode, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, rank


class Above(Pruner):
    """Retains tokens whose norm is above the row's mean; the budget does not matter."""

    name = "above"
    exact_count = False

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert bool(tokens.valid_BV.any(1).all()), "no row of nothing is shown"
        norm_BV = tokens.vision_BVD.float().norm(dim=-1)
        count_B1 = tokens.valid_BV.sum(1, keepdim=True)
        mean_B1 = norm_BV.masked_fill(~tokens.valid_BV, 0.0).sum(1, keepdim=True) / count_B1
        # padding is not left out here: the caller must do so
        return Selection(norm_BV > self.factor * mean_B1, norm_BV)


class Some(Pruner):
    """Retains another number in each row, 0 among them: by how many tokens it has and how they look."""

    name = "some"
    exact_count = False

    def __init__(self, modulus: int = 5) -> None:
        super().__init__()
        self.modulus = modulus

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        scores_BV = tokens.vision_BVD.float().norm(dim=-1)
        first_B = tokens.vision_BVD[:, 0].float().abs().sum(-1)
        count_B = (first_B * 10).long() % self.modulus * 7
        keep_BV = rank(scores_BV, tokens.valid_BV) < count_B[:, None]
        return Selection(keep_BV & tokens.valid_BV, scores_BV)


class Empty(Pruner):
    """Retains nothing of some rows, and the budget of others."""

    name = "empty"
    exact_count = False

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        scores_BV = tokens.vision_BVD.float().norm(dim=-1)
        odd_B = (tokens.vision_BVD[:, 0].float().abs().sum(-1) * 10).long() % 2 == 1
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B) & odd_B[:, None], scores_BV)


PLANS = {
    "above": [Stage(Above(), 0, keep_ratio=0.1)],
    "at 2": [Stage(Above(), 2, keep_tokens=3)],
    "some": [Stage(Some(), 0, keep_ratio=0.5)],
    "empty": [Stage(Empty(), 2, keep_tokens=9)],
    "then exact": [
        Stage(Some(), 0, keep_ratio=0.5),
        Stage("uniform", 2, keep_tokens=5),
        Stage("pool", 4, keep_tokens=2),
    ],
    "then two": [Stage(Above(), 0, keep_ratio=0.5), Stage(Empty(), 2, keep_tokens=5), Stage(Some(3), 4, keep_tokens=2)],
}


@pytest.fixture(params=["llava", "qwen2_vl", "gemma3"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield from lent((request.param, list_families()[request.param].tiny.variants[0]))


QUICK = [("above", "original"), ("empty", "original"), ("then exact", "original"), ("then two", "compact")]
"""At the first layer, inside, before exact stages, and several of these."""

SAMPLES = [(5, 1, 7), (3, 2, 8), (4, 0, 9), (6, 3, 4)]


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        pytest.param(name, positions, marks=() if (name, positions) in QUICK else pytest.mark.slow)
        for name in PLANS
        for positions in ("original", "compact")
    ],
)
def test_equals_the_reference(subject: Subject, name: str, positions: str) -> None:
    plan = subject.plan(PLANS[name], positions=positions)
    modes = ("mask",) if subject.hides else ()
    for side in ("left", "right"):
        check(subject.model, subject.base, plan, subject.batch(*SAMPLES, side=side), modes=modes)
        detach(subject.model)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("empty", "then two") else pytest.mark.slow) for n in PLANS]
)
def test_each_sample_equals_the_sample_alone(subject: Subject, name: str) -> None:
    inputs = subject.batch(*SAMPLES)
    attach(subject.model, subject.plan(PLANS[name]))
    with record(subject.model) as trace:
        cached = generate(subject.model, inputs, new=3)
    counts = [stage.vision_out for stage in trace.stages]
    assert logit_gap(cached, generate(subject.model, inputs, new=3, use_cache=False)) < tolerance(subject.model)
    found: list[list[int]] = [[] for _ in counts]
    for b in range(len(SAMPLES)):
        with record(subject.model) as lone:
            single = generate(subject.model, alone(inputs, SAMPLES, b, subject.case[0], subject.config), new=3)
        gap = max((x[0] - y[b]).abs().max().item() for x, y in zip(single.logits, cached.logits, strict=True))
        assert gap < tolerance(subject.model)
        assert torch.equal(new_tokens(single, 3)[0], new_tokens(cached, 3)[b])
        for total, stage in zip(found, lone.stages, strict=False):
            total += stage.vision_out
    assert found == counts
    if name != "empty":  # how rows look decides: here all may be alike
        assert any(len(set(row)) > 1 for row in counts), "control: rows retain different numbers"
    for stage in trace.stages:
        assert stage.retained_RV.sum(1).tolist() == stage.vision_out
        assert all(out <= came for out, came in zip(stage.vision_out, stage.vision_in, strict=True))


def test_zero_is_a_count(subject: Subject) -> None:
    inputs, seen = subject.batch(*SAMPLES), set()
    for name in ("some", "empty", "then exact", "then two"):
        attach(subject.model, subject.plan(PLANS[name]))
        with record(subject.model) as trace, torch.no_grad():
            subject.model(**inputs)
        seen |= {0 in stage.vision_out and sum(stage.vision_out) > 0 for stage in trace.stages}
        detach(subject.model)
    assert True in seen, "control: a row of nothing beside others"


def test_more_than_the_budget_and_everything(model: Any) -> None:
    inputs = batch([(5, 2, 7)])
    for factor, expected in ((0.0, 64), (1e9, 0)):
        for layer in (0, 2):
            attach(model, PruningPlan([Stage(Above(factor), layer, keep_tokens=3)]))
            with record(model) as trace, torch.no_grad():
                out = model(**inputs).logits
                if expected:
                    with mode(model, "off"):
                        assert torch.equal(out, model(**inputs).logits), "all of them: the base"
            assert trace.stages[0].vision_out == [expected] * 2
            assert f"vision tokens 128 -> {2 * expected}" in str(trace)
            detach(model)


def test_a_budget_of_everything_asks_nevertheless(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    for rule in (Above(), "uniform"):
        attach(model, PruningPlan([Stage(rule, 2, keep_ratio=1.0)]))
        with record(model) as trace, torch.no_grad():
            model(**inputs)
        (stage,) = trace.stages
        asked = isinstance(rule, Above)
        assert (stage.view is not None) == asked
        assert (stage.vision_out[0] < 64) == asked
        detach(model)


def test_nothing_left_asks_nobody(model: Any) -> None:
    """Every row empty: later stages have no view to show."""
    attach(model, PruningPlan([Stage(Above(1e9), 0, keep_tokens=8), Stage("pool", 2, keep_tokens=4)]))
    inputs = batch([(5, 1, 7), (3, 2, 8)])
    with record(model) as trace, torch.no_grad():
        model(**inputs, labels=answer_labels(inputs))
    assert [stage.vision_out for stage in trace.stages] == [[0] * 3] * 2
    assert trace.stages[1].view is None


@pytest.mark.parametrize(
    "config",
    [
        "os.path.join",
        {"type": "os.path.join"},
        {"type": "mix", "importance": "os.path.join"},
        {"type": "mix", "importance": {"type": "mix", "importance": {"type": "os.path.join"}}},
        {"type": "mix", "importance": ["random", "os.path.join"]},
        {"type": "dart", "pivot": {"type": "os.path.join"}},
        {"type": "dart", "pivot": {"deep": [{"type": "os.path.join"}]}},
    ],
)
def test_a_plan_to_load_names_nothing_outside(config: Any) -> None:
    """A checkpoint's plan imports nothing from elsewhere, however deep it is named."""
    plan = {"stages": [{"pruner": config, "keep_tokens": 3}]}
    known = "outside tpcompress|is a name or a mapping|has no pivot criterion|pivot must be str"
    with pytest.raises(ValueError, match=known):
        PruningPlan.from_dict(plan, allow_outside=False)


def test_a_plan_to_load_may_name_what_is_inside() -> None:
    config = {"type": "mix", "importance": {"type": "random", "seed": 3}}
    plan = PruningPlan.from_dict({"stages": [{"pruner": config, "keep_tokens": 3}]}, allow_outside=False)
    again = PruningPlan.from_dict(plan.to_dict(), allow_outside=False)
    assert again.to_dict() == plan.to_dict()
