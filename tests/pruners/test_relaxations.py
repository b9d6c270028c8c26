"""Relaxations of a top-k, and gates that are drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pruners.selector_scores import choose, draw, every_relaxation, made, scored

from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.selectors.gumbel_topk import plackett_luce
from tpcompress.pruners.selectors.relaxations import (
    laplace_cdf,
    laplace_shift,
    soft_topk,
    straight_through,
)

# ------------------------------------------------------------------------------------------------------ soft top-k


@every_relaxation
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 300.0])
def test_weights_sum_to_any_count(relaxation: str, scale: float) -> None:
    V = 64
    scores = draw(V, V) * scale
    valid = torch.ones(V, V, dtype=torch.bool)
    valid[3, 9:] = False
    counts = torch.arange(1, V + 1)
    weight = soft_topk(scores, valid, counts, relaxation)
    assert torch.allclose(weight.sum(1), counts.float(), rtol=2e-5, atol=2e-5)
    assert (weight[3, 9:] == 0).all()
    assert (weight[:, scores[0].argsort()][0].diff() >= 0).all(), "weights rank like scores"
    constant = soft_topk(torch.full((3, 10), 7.0), torch.ones(3, 10).bool(), torch.tensor([1, 5, 10]), relaxation)
    assert torch.allclose(constant, torch.tensor([[0.1], [0.5], [1.0]]).expand(3, 10), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0, 1000.0])
def test_laplace_threshold_equals_bisection(scale: float) -> None:
    scores = (draw(40, 23) * scale).double()
    valid = torch.arange(23) < torch.arange(4, 44)[:, None].clamp(max=23)
    target = torch.arange(40)[:, None].remainder(3).double() + 1
    low, high = -scores.amax(1, keepdim=True) - 60, -scores.amin(1, keepdim=True) + 60
    for _ in range(200):
        middle = (low + high) / 2
        below = laplace_cdf(scores + middle).masked_fill(~valid, 0.0).sum(1, keepdim=True) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    shift = laplace_shift(scores, valid, target)
    sums = [laplace_cdf(scores + t).masked_fill(~valid, 0.0).sum(1) for t in (shift, (low + high) / 2)]
    assert torch.allclose(*sums, atol=1e-9)
    assert torch.allclose(sums[0], target[:, 0], atol=1e-9)
    if scale <= 1:
        assert torch.allclose(shift, (low + high) / 2, atol=1e-8), "where the sum is not flat, t is one number"


def test_laplace_cdf_is_one_with_a_slope_everywhere() -> None:
    x = torch.tensor([-800.0, -1.0, 0.0, 1.0, 800.0], dtype=torch.float64, requires_grad=True)
    y = laplace_cdf(x)
    assert torch.allclose(y.detach(), torch.tensor([0, math.exp(-1) / 2, 0.5, 1 - math.exp(-1) / 2, 1]).double())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, torch.exp(-x.detach().abs()) / 2)


@every_relaxation
def test_gradient_equals_finite_differences_and_sums_to_nothing(relaxation: str) -> None:
    scores = draw(3, 7).double().requires_grad_()
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 4:] = False
    counts = torch.tensor([2, 3, 6])
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, valid, counts, relaxation), scores, eps=1e-5, atol=1e-5)
    weight = soft_topk(scores, valid, counts, relaxation)
    (grad,) = torch.autograd.grad((weight * draw(3, 7, seed=5)).sum(), scores)
    assert grad.abs().max() > 1e-3
    assert grad.sum(1).abs().max() < 1e-9, "what one token gains the others lose"
    (grad,) = torch.autograd.grad(soft_topk(scores, valid, counts, relaxation).sum(), scores)
    assert grad.abs().max() < 1e-9, "the sum is fixed"


@every_relaxation
def test_straight_through_is_hard_forward_and_soft_backward(relaxation: str) -> None:
    counts = [1, 5, 12]
    soft, hard = (made({"type": name, "relaxation": relaxation}) for name in ("soft_topk", "straight_through"))
    grads = []
    for selector in (soft, hard):
        scores, valid = scored(3, 12)
        gate = choose(selector, scores, valid, counts, True).gate_BV
        assert gate is not None
        grads += torch.autograd.grad((gate * draw(3, 12, seed=7)).sum(), scores.scores_BV)
    assert torch.equal(gate, choose(hard, scores, valid, counts, False).keep_BV.float()), "bit for bit"
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 1e-2
    values = torch.rand(1000)
    assert torch.equal(straight_through(values > 0.5, values), (values > 0.5).float())


@pytest.mark.parametrize("name", ["soft_topk", "gumbel", "threshold"])
def test_gates_sharpen_with_progress(name: str) -> None:
    selector, temperatures, undecided = made(name), [], []
    scores, valid = scored(4, 50)
    for progress in (0.0, 0.5, 1.0, 7.0):
        selector.set_progress(progress)
        gate = choose(selector, scores, valid, [10] * 4, True).gate_BV
        (grad,) = torch.autograd.grad((gate * draw(4, 50, seed=3)).sum(), scores.scores_BV)
        temperatures.append(selector.temperature)
        undecided.append((grad.abs() > 1e-2).sum().item())
    assert temperatures[0] == selector.temperature_start
    assert temperatures[1] == pytest.approx((temperatures[0] * temperatures[2]) ** 0.5)
    assert temperatures[2] == temperatures[3] == pytest.approx(selector.temperature_end)
    assert undecided[2] < undecided[1] < undecided[0], "fewer tokens are undecided"


# ---------------------------------------------------------------------------------------------------------- Gumbel


def test_gumbel_gates_open_as_often_as_their_logits_say() -> None:
    selector = made("gumbel")
    selector.affine.data = torch.tensor([0.5, -0.3])  # type: ignore[union-attr]
    B, V, k = 4000, 6, 2
    one = torch.tensor([-1.5, -0.5, 0.0, 0.2, 0.8, 1.0]).expand(B, V)
    choice = choose(selector, Scores(one), torch.ones(B, V).bool(), [k] * B, True)
    logits = math.exp(0.5) * one[0] - 0.3 + math.log(k / (V - k))
    assert set(choice.gate_BV.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(choice.gate_BV.mean(0), logits.sigmoid(), atol=0.035)  # 4 standard errors
    assert torch.equal(choice.expected_B, choice.gate_BV.sum(1))
    assert len(choice.expected_B.unique()) > 3, "the number of open gates is free"
    opened, kept = choice.gate_BV > 0, choice.keep_BV
    few = opened.sum(1) <= k
    assert (opened <= kept)[few].all(), "a cut sequence has the open tokens first"
    assert (kept <= opened)[~few].all()


def test_gumbel_learns_its_level_from_a_loss_on_the_count() -> None:
    selector = made("gumbel")
    scores, valid = scored(64, 40)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.05)
    before = choose(selector, scores, valid, [20] * 64, True).expected_B.mean().item()
    for step in range(60):
        optimizer.zero_grad()
        expected = choose(selector, scores, valid, [20] * 64, True, step).expected_B
        (expected.mean() / 40 - 0.25).square().backward()
        optimizer.step()
    after = choose(selector, scores, valid, [20] * 64, True, 99).expected_B.mean().item()
    assert before == pytest.approx(20, abs=1)
    assert after == pytest.approx(10, abs=1)


def ordered_probability(logits: list[float], order: tuple[int, ...]) -> float:
    left, p = list(range(len(logits))), 1.0
    for token in order:
        p *= math.exp(logits[token]) / sum(math.exp(logits[v]) for v in left)
        left.remove(token)
    return p


def test_plackett_luce_sums_to_one_over_all_ordered_sets() -> None:
    logits, k = [0.3, -1.2, 2.0, 0.0, 0.7], 3
    orders = list(itertools.permutations(range(5), k))
    place = torch.zeros(len(orders), 7, dtype=torch.long)
    for row, order in enumerate(orders):
        rest = [v for v in range(5) if v not in order]
        for spot, token in enumerate((*order, *rest, 5, 6)):
            place[row, token] = spot
    wide = torch.tensor([*logits, 1e3, -1e3]).expand(len(orders), -1)  # two of padding, loud
    valid = torch.tensor([True] * 5 + [False] * 2).expand(len(orders), -1)
    log_prob = plackett_luce(wide, place, valid, torch.full((len(orders),), k))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    expected = torch.tensor([ordered_probability(logits, order) for order in orders])
    assert torch.allclose(log_prob.exp(), expected, atol=1e-6)


def test_plackett_luce_gradient() -> None:
    logits = (draw(3, 6) * 3).double().requires_grad_()
    valid = torch.arange(6) < torch.tensor([[6], [4], [1]])
    place = draw(3, 6, seed=2).masked_fill(~valid, -99).argsort(1, descending=True).argsort(1)
    counts = torch.tensor([2, 4, 1])
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, place, valid, counts), logits, eps=1e-6, atol=1e-6)
    far = (draw(2, 6) * 500).requires_grad_()
    plackett_luce(far, place[:2], valid[:2], counts[:2]).sum().backward()
    assert far.grad.isfinite().all()  # type: ignore[union-attr]


def test_drawn_sets_come_as_often_as_their_probability_says() -> None:
    selector, B = made({"type": "gumbel_topk", "noise_start": 0.7, "noise_end": 0.7}), 6000
    row = torch.tensor([1.2, 0.1, -0.4, -0.9])
    choice = choose(selector, Scores(row.expand(B, 4)), torch.ones(B, 4).bool(), [2] * B, True)
    for pair in itertools.combinations(range(4), 2):
        p = sum(ordered_probability((row / 0.7).tolist(), order) for order in itertools.permutations(pair))
        drawn = choice.keep_BV[:, list(pair)].all(1).float().mean().item()
        assert drawn == pytest.approx(p, abs=4 * (p * (1 - p) / B) ** 0.5 + 1e-4)
        # the probability it reports is that of one of the two orders
        reported = choice.log_prob_B[choice.keep_BV[:, list(pair)].all(1)].exp().unique()
        orders = torch.tensor([ordered_probability((row / 0.7).tolist(), o) for o in itertools.permutations(pair)])
        assert all((orders - r).abs().min() < 1e-4 for r in reported)


def test_score_function_is_centred() -> None:
    """E[d log p] = 0, without which a baseline would bias the gradient."""
    row, B = torch.tensor([1.2, 0.1, -0.4, -0.9]), 6000
    scores = row.expand(B, 4).clone().requires_grad_()
    choice = choose(made("gumbel_topk"), Scores(scores), torch.ones(B, 4).bool(), [2] * B, True)
    (grad,) = torch.autograd.grad(choice.log_prob_B.sum(), scores)
    assert (grad.mean(0).abs() < 4 * grad.std(0) / B**0.5).all()
    assert grad.abs().mean() > 0.1, "control: the single gradients are not small"
