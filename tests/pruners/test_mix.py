"""The dial between importance and uniqueness: fixed, scheduled and learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import batch, gradients, make_pruner, make_view, pad_view

from tpcompress.insertion.attach import attach, mode
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner, TokenView, create
from tpcompress.pruners.mix import normalise, unlike_last

D = 16
INNER = ["fastv", "novelty", "divprune", "dart", "uniform", "random"]


def view_over(pruner: Pruner, grid: tuple[int, int], B: int = 3) -> TokenView:
    x = torch.randn(B, grid[0] * grid[1], D, generator=torch.Generator().manual_seed(0))
    return make_view(pruner, x, grid)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("norm", ["minmax", "rank", "standard"])
def test_the_ends_of_alpha_are_the_two_rules(inner: str, norm: str) -> None:
    plain = make_pruner({"type": inner})
    first = make_pruner({"type": "mix", "importance": inner, "alpha": 1.0, "norm": norm})
    second = make_pruner({"type": "mix", "uniqueness": inner, "alpha": 0.0, "norm": norm})
    assert first.needs == second.needs == plain.needs
    view = view_over(plain, (5, 7))
    for k in (1, 6, 20, 35):
        expected = plain(view, torch.full((3,), k)).keep_BV
        assert torch.equal(first(view, torch.full((3,), k)).keep_BV, expected)
        assert torch.equal(second(view, torch.full((3,), k)).keep_BV, expected)


def test_near_the_ends_the_order_is_that_of_the_rule() -> None:
    """Without the short cut of the ends: normalising must not turn two scores around."""
    for norm in ("minmax", "rank", "standard"):
        near = make_pruner({"type": "mix", "alpha": 1 - 1e-7, "norm": norm})
        view = view_over(near, (8, 8))
        expected = make_pruner({"type": "fastv"})(view, torch.tensor([1, 16, 40])).keep_BV
        assert torch.equal(near(view, torch.tensor([1, 16, 40])).keep_BV, expected)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("uniqueness", ["last_prompt", "last_vision"])
def test_mix_as_published(alpha: float, uniqueness: str) -> None:
    pruner = make_pruner({"type": "mix", "alpha": alpha, "uniqueness": uniqueness})
    view = view_over(pruner, (5, 7))
    scores = pruner(view, torch.tensor([3, 9, 20])).scores_BV
    for b in range(3):
        importance = view.attention_BHV[b].double().mean(0)
        last = view.text_BSD[b, -1] if uniqueness == "last_prompt" else view.vision_BVD[b, -1]
        unique = 1 - torch.stack(
            [torch.cosine_similarity(x.double(), last.double(), dim=0) for x in view.vision_BVD[b]]
        )
        ours = [(s - s.min()) / (s.max() - s.min()) for s in (importance, unique)]
        assert torch.allclose(scores[b].double(), alpha * ours[0] + (1 - alpha) * ours[1], atol=1e-5)


def test_the_last_word_is_that_of_the_prompt() -> None:
    pruner = make_pruner({"type": "mix"})
    view = view_over(pruner, (5, 7))
    role = view.text_role_BS.clone()
    role[1, 8:], role[2] = 0, 0
    view = replace(view, text_role_BS=role)
    score = unlike_last(view, "last_prompt")
    for b, s in ((0, 10), (1, 7)):
        expected = 1 - torch.cosine_similarity(view.vision_BVD[b], view.text_BSD[b, s][None], dim=-1)
        assert torch.allclose(score[b], expected, atol=1e-6)
    assert (score[2] == 1).all(), "no word"
    padded = unlike_last(pad_view(view, 4, (6, 7)), "last_vision")
    assert torch.allclose(padded[:, :35], unlike_last(view, "last_vision"))


def test_norms() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0, -5.0, 99.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    valid = torch.tensor([[True] * 4 + [False], [True] * 5])
    assert torch.allclose(normalise(scores, valid, "minmax")[0, :4], torch.tensor([1.0, 0.75, 1.0, 0.0]))
    assert torch.allclose(normalise(scores, valid, "rank")[0, :4], torch.tensor([1.0, 1 / 3, 1.0, 0.0]))
    assert torch.allclose(normalise(scores, valid, "standard")[0, :4].mean(), torch.tensor(0.0), atol=1e-6)
    assert [normalise(scores, valid, norm)[1].unique().tolist() for norm in ("minmax", "rank", "standard")] == [
        [0],
        [1],
        [0],
    ]
    one = torch.tensor([[4.0]])
    assert all(normalise(one, one > 0, norm).isfinite().all() for norm in ("minmax", "rank", "standard"))


def test_scheduled_alpha_follows_progress_and_ends_at_its_end() -> None:
    pruner = make_pruner({"type": "mix", "mode": "scheduled", "alpha": 1.0, "alpha_end": 0.0})
    view, counts = view_over(pruner, (5, 7)), torch.tensor([5, 9, 20])
    fixed = {alpha: make_pruner({"type": "mix", "alpha": alpha})(view, counts).keep_BV for alpha in (1.0, 0.5, 0.0)}
    assert torch.equal(pruner(view, counts).keep_BV, fixed[0.0]), "outside training it is the end"
    for progress, alpha in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (7.0, 0.0)):
        pruner.set_progress(progress)
        assert torch.equal(pruner(view, counts).keep_BV, fixed[alpha])


def test_learned_alpha_starts_as_the_fixed_one_and_learns_from_the_gate() -> None:
    pruner = create({"type": "mix", "mode": "learned", "alpha": 0.3})
    pruner.build(D)
    weight = pruner.weight
    pruner.build(D)
    assert pruner.weight is weight
    assert [p.numel() for p in pruner.parameters()] == [1]
    view, counts = replace(view_over(pruner, (5, 7)), soft=True), torch.tensor([5, 9, 20])
    fixed = make_pruner({"type": "mix", "alpha": 0.3})(view, counts)
    assert torch.equal(pruner.eval()(view, counts).keep_BV, fixed.keep_BV)
    # The gate should open for what is important: alpha rises; for what is unique: it falls.
    attention = view.attention_BHV.mean(1)
    for target, rises in ((attention, True), (unlike_last(view, "last_prompt"), False)):
        learner = create({"type": "mix", "mode": "learned", "alpha": 0.3})
        learner.build(D)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
        wanted = normalise(target, view.valid_BV, "standard")
        for _ in range(20):
            optimizer.zero_grad()
            gate = learner.train()(view, counts).gate_BV
            (-(gate * wanted).mean()).backward()
            optimizer.step()
        alpha = float(learner.weight.detach().sigmoid())
        assert (alpha > 0.35) == rises
        assert (alpha < 0.25) == (not rises)


def test_alpha_is_trained_inside_a_model(model: Any) -> None:
    attach(model, PruningPlan([Stage({"type": "mix", "mode": "learned"}, 2, keep_tokens=9)]))
    inputs = batch([(5, 1, 7), (3, 1, 8)])
    model.train()
    with mode(model, "mask"):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 90, -100)).loss.backward()
    found = {name: g for name, g in gradients(model).items() if "token_pruners" in name}
    assert len(found) == 1
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found.values())
