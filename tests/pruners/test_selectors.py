"""What every selector promises, and the formulas of each."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from no_sync import NoSync
from support import config_id
from torch import Tensor

from tpcompress.pruners.gate_components import Choice, Scores, Selector
from tpcompress.pruners.registry import create_part, list_parts
from tpcompress.pruners.selectors.argmax_union import any_vote, ballots
from tpcompress.pruners.selectors.gumbel_topk import plackett_luce
from tpcompress.pruners.selectors.learned_budget import prefix_probability
from tpcompress.pruners.selectors.relaxations import (
    RELAXATIONS,
    laplace_cdf,
    laplace_shift,
    soft_topk,
    straight_through,
)
from tpcompress.pruners.selectors.threshold import deciles, normal_threshold, within
from tpcompress.pruners.topk import keep_topk, standardise

CONFIGS = [{"type": name, **more} for name, cls in list_parts("selector").items() for more in ({}, *cls.test_arguments)]
D = 8

every_selector = pytest.mark.parametrize("config", CONFIGS, ids=config_id)
every_relaxation = pytest.mark.parametrize("relaxation", RELAXATIONS)


def made(config: str | dict[str, Any]) -> Selector:
    selector = create_part("selector", config)
    selector.build(D)
    return selector


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Row b of the first dimension is the same whatever is around it."""
    rows = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + 100 * b)) for b in range(shape[0])]
    return torch.stack(rows)


def scored(B: int, V: int, valid_BV: Tensor | None = None, seed: int = 0) -> tuple[Scores, Tensor]:
    """Standardised scores that want a gradient, votes for all, and what is valid."""
    valid_BV = torch.ones(B, V, dtype=torch.bool) if valid_BV is None else valid_BV
    scores_BV = standardise(draw(B, V, seed=seed), valid_BV).requires_grad_()
    return Scores(scores_BV, votes_BVV=draw(B, V, V, seed=seed + 1).requires_grad_()), valid_BV


def choose(
    selector: Selector, scores: Scores, valid_BV: Tensor, counts: list[int], explore: bool, seed: int = 0
) -> Choice:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        choice: Choice = selector(scores, valid_BV, torch.tensor(counts), explore)
    return choice


def is_noisy(selector: Selector) -> bool:
    """Exploring, it draws."""
    scores, valid = scored(2, 30)
    one, two = (choose(selector, scores, valid, [7, 9], True, seed) for seed in (0, 1))
    same = torch.equal(one.keep_BV, two.keep_BV)
    return not (same and (one.gate_BV is None or torch.equal(one.gate_BV, two.gate_BV)))


def test_variants_name_registered_selectors() -> None:
    assert len(list_parts("selector")) >= 8
    noisy = {config["type"] for config in CONFIGS if is_noisy(made(config))}
    assert {"gumbel", "gumbel_topk", "argmax_union"} <= noisy
    assert not {"topk", "soft_topk", "straight_through"} & noisy


@every_selector
def test_config_round_trip(config: dict[str, Any]) -> None:
    selector = made(config)
    again = made(selector.config())
    assert again.config() == selector.config() == json.loads(json.dumps(selector.config()))
    assert config.items() <= again.config().items()
    assert selector.learned == bool(list(selector.parameters()))
    for weight in selector.parameters():
        weight.data += 0.3
    again.load_state_dict(selector.state_dict())
    scores, valid = scored(3, 12)
    one, two = (choose(s, scores, valid, [2, 5, 9], True) for s in (selector, again))
    assert torch.equal(one.keep_BV, two.keep_BV)
    selector.build(D)
    assert all(weight.ne(0).any() for weight in selector.parameters()), "building twice changes nothing"


@every_selector
@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ragged", "constant", "peaky"])
def test_every_count_of_every_row(config: dict[str, Any], explore: bool, kind: str) -> None:
    selector, V = made(config), 12
    valid = torch.arange(V) < (torch.arange(1, V + 1)[:, None] if kind == "ragged" else V)
    valid = valid.expand(V, V)
    counts = [(r // 2) + 1 for r in range(V)] if kind == "ragged" else list(range(1, V + 1))
    scores, _ = scored(V, V, valid)
    if kind == "constant":
        scores = Scores(torch.zeros(V, V).requires_grad_(), votes_BVV=torch.zeros(V, V, V).requires_grad_())
    if kind == "peaky":
        peak = torch.zeros(V, V).index_fill_(1, torch.tensor(5), 300.0)
        scores = Scores(peak.requires_grad_(), votes_BVV=(peak[:, None] + torch.zeros(V, V, V)).requires_grad_())
    choice = choose(selector, scores, valid, counts, explore)
    assert choice.keep_BV.dtype == torch.bool
    assert not (choice.keep_BV & ~valid).any()
    assert choice.keep_BV.any(1).all(), "a row with tokens retains one"
    if selector.exact_count:
        assert choice.keep_BV.sum(1).tolist() == counts
    assert choice.scores_BV is scores.scores_BV
    parts = [t for t in (choice.gate_BV, choice.log_prob_B, choice.expected_B) if t is not None]
    assert explore or not parts, "noise and gates are for training"
    for part in parts:
        assert part.dtype == torch.float32
        assert part.isfinite().all()
    if choice.gate_BV is not None:
        assert ((choice.gate_BV >= 0) & (choice.gate_BV <= 1)).all()
        assert (choice.gate_BV[~valid] == 0).all()
    if parts:
        leaves = [scores.scores_BV, scores.votes_BVV, *selector.parameters()]
        grads = torch.autograd.grad(sum(p.square().sum() for p in parts), leaves, allow_unused=True)
        assert any(g is not None for g in grads)
        assert all(g is None or g.isfinite().all() for g in grads)


@every_selector
@pytest.mark.parametrize("explore", [False, True])
def test_one_token(config: dict[str, Any], explore: bool) -> None:
    scores, valid = scored(2, 1)
    choice = choose(made(config), scores, valid, [1, 1], explore)
    assert choice.keep_BV.all()
    if choice.log_prob_B is not None:
        assert choice.log_prob_B.abs().max() < 1e-6


@every_selector
def test_a_row_without_tokens_spoils_no_gradient(config: dict[str, Any]) -> None:
    valid = torch.tensor([[True] * 6, [False] * 6])
    scores, _ = scored(2, 6, valid)
    selector = made(config)
    choice = choose(selector, scores, valid, [3, 0], True)
    assert not choice.keep_BV[1].any()
    parts = [t for t in (choice.gate_BV, choice.log_prob_B, choice.expected_B) if t is not None]
    leaves = [scores.scores_BV, scores.votes_BVV, *selector.parameters()]
    if parts:
        grads = torch.autograd.grad(sum(p.square().sum() for p in parts), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


@every_selector
def test_inference_is_deterministic(config: dict[str, Any]) -> None:
    scores, valid = scored(3, 20)
    selector = made(config)
    one, two = (choose(selector, scores, valid, [2, 7, 20], False, seed) for seed in (0, 1))
    assert torch.equal(one.keep_BV, two.keep_BV)
    assert one.gate_BV is None
    assert one.log_prob_B is None


@every_selector
def test_rows_depend_on_no_partner_and_no_padding(config: dict[str, Any]) -> None:
    selector, counts = made(config), [1, 4, 11, 12]
    scores, valid = scored(4, 12)
    for explore in (False, True):
        if explore and is_noisy(selector):
            continue  # draws per token of the batch
        together = choose(selector, scores, valid, counts, explore)
        loud = torch.full((4, 5), 1e3)
        votes = torch.nn.functional.pad(scores.votes_BVV, (0, 5, 0, 5), value=1e3)
        wide = Scores(torch.cat([scores.scores_BV, loud], 1), votes_BVV=votes)
        padded = choose(selector, wide, torch.cat([valid, loud < 0], 1), counts, explore)
        assert torch.equal(padded.keep_BV[:, :12], together.keep_BV)
        assert not padded.keep_BV[:, 12:].any()
        for b in range(4):
            row = Scores(scores.scores_BV[b : b + 1], votes_BVV=scores.votes_BVV[b : b + 1])
            alone = choose(selector, row, valid[b : b + 1], counts[b : b + 1], explore)
            assert torch.equal(alone.keep_BV[0], together.keep_BV[b])
            if together.gate_BV is not None:
                assert torch.allclose(alone.gate_BV[0], together.gate_BV[b], atol=1e-5)
        if together.gate_BV is not None:
            assert torch.allclose(padded.gate_BV[:, :12], together.gate_BV, atol=1e-5)
        if together.expected_B is not None:
            assert torch.allclose(padded.expected_B, together.expected_B, atol=1e-4)


@every_selector
def test_no_choice_makes_the_host_wait(config: dict[str, Any]) -> None:
    selector, counts = made(config), torch.tensor([2, 7, 20])
    scores, valid = scored(3, 20)
    with NoSync() as guard:
        for explore in (False, True):
            selector(scores, valid, counts, explore)
    assert guard.seen > 5, "control: it ran under the guard"


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


# ------------------------------------------------------------------------------------- selectors that count themselves


def test_threshold_starts_near_the_budget_and_counts_for_itself() -> None:
    scores, valid = scored(200, 100)
    selector = made("threshold")
    for k in (10, 30, 60):
        counts = choose(selector, scores, valid, [k] * 200, False).keep_BV.sum(1)
        assert counts.float().mean().item() == pytest.approx(k, abs=1.5)
        assert len(counts.unique()) > 2
    selector.level.data += 0.5  # type: ignore[union-attr]
    assert choose(selector, scores, valid, [30] * 200, False).keep_BV.sum() < 200 * 25


def test_threshold_cap_and_floor() -> None:
    scores, valid = scored(4, 40)
    selector = made({"type": "threshold", "cap": 1.5, "floor": 0.5})
    for level, expected in ((-50.0, [15, 30, 40, 2]), (50.0, [5, 10, 20, 1])):  # 0.5 and 1.5 of one token: 1 and 2
        selector.level.data.fill_(level)  # type: ignore[union-attr]
        keep = choose(selector, scores, valid, [10, 20, 40, 1], False).keep_BV
        assert keep.sum(1).tolist() == expected
        assert torch.equal(keep, keep_topk(scores.scores_BV, valid, torch.tensor(expected))), "the best ones"
    passing = torch.tensor([[False, True, False]])
    assert within(passing, torch.tensor([[3.0, 2, 1]]), torch.ones(1, 3).bool(), torch.tensor([2]), 0, 1).tolist() == [
        [True, True, False]
    ]


def test_threshold_of_each_sample_reads_its_deciles() -> None:
    valid = torch.arange(25) < torch.tensor([[21], [1], [25], [0]])
    scores = torch.arange(25.0).flip(0).expand(4, -1)
    row = deciles(scores, valid)
    assert row[0].tolist() == [22, 20, 18, 16, 14, 12, 10, 8, 6]  # of the 21 highest: 24 to 4
    assert row[1].tolist() == [24] * 9
    assert row[3].tolist() == [0] * 9
    selector = made({"type": "threshold", "per_sample": True})
    scores_, valid = scored(3, 40)
    gate = choose(selector, scores_, valid, [10] * 3, True)
    gate.expected_B.sum().backward()
    assert selector.slope.grad.abs().max() > 1e-3  # type: ignore[union-attr]
    before = choose(selector, scores_, valid, [10] * 3, False).keep_BV.sum(1)
    selector.slope.data[0] = -1.0  # type: ignore[union-attr]
    assert (choose(selector, scores_, valid, [10] * 3, False).keep_BV.sum(1) > before).all()
    assert normal_threshold(torch.ones(1, 4).bool(), torch.tensor([2])).abs().item() < 1e-6


def test_learned_budget_starts_at_the_budget() -> None:
    for candidates in (2, 5, 16, 33):
        selector = made({"type": "learned_budget", "candidates": candidates, "spread": 0.5})
        scores, valid = scored(5, 60)
        counts = [2, 10, 20, 33, 40]
        assert choose(selector, scores, valid, counts, False).keep_BV.sum(1).tolist() == counts


def test_learned_budget_spends_what_its_weights_say() -> None:
    selector = made({"type": "learned_budget", "candidates": 4, "spread": 0.75})  # factors 0.25, 0.75, 1.25, 1.75
    scores, valid = scored(3, 40)
    for index, expected in ((0, [1, 5, 10]), (1, [3, 15, 30]), (2, [5, 25, 40]), (3, [7, 35, 40])):
        selector.logits.data = torch.full((4,), -40.0).index_fill_(0, torch.tensor(index), 40.0)  # type: ignore[union-attr]
        choice = choose(selector, scores, valid, [4, 20, 40], True)
        assert choice.keep_BV.sum(1).tolist() == expected
        assert choice.expected_B.tolist() == expected
        assert torch.equal(choice.gate_BV, choice.keep_BV.float()), "0 or 1 forward"
        assert torch.equal(choice.keep_BV, keep_topk(scores.scores_BV, valid, torch.tensor(expected)))


def test_learned_budget_gradients() -> None:
    share, count = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[1.0, 2.0, 4.0]])
    place = torch.tensor([[3, 0, 1, 2, 4]])
    assert torch.allclose(prefix_probability(place, count, share), torch.tensor([[0.3, 1.0, 0.8, 0.3, 0.0]]))
    selector = made("learned_budget")
    scores, valid = scored(2, 30)
    choice = choose(selector, scores, valid, [10, 10], True)
    (more,) = torch.autograd.grad(choice.expected_B.sum(), selector.logits, retain_graph=True)
    assert (more.diff() > 0).all(), "a larger candidate asks for more"
    # A token of place 12 passes with the candidates that reach behind it.
    late = scores.scores_BV[0].argsort(descending=True)[12]
    (gate,) = torch.autograd.grad(choice.gate_BV[0, late], selector.logits, retain_graph=True)
    reaches = selector.counts(valid, torch.tensor([10, 10]))[0] > 12
    assert (gate[reaches] > 0).all()
    assert (gate[~reaches] < 0).all()
    (score,) = torch.autograd.grad(choice.gate_BV[0, late], scores.scores_BV)
    assert score[0, late] > 0


def test_union_keeps_whoever_has_a_vote() -> None:
    votes = torch.full((1, 5, 5), -1.0)
    for voter, choice in ((0, 3), (1, 3), (2, 1), (3, 1), (4, 2)):
        votes[0, voter, choice] = 2.0
    valid = torch.tensor([[True] * 4 + [False]])
    scores = Scores(torch.tensor([[0.0, 1.0, 0, 0, 9.0]]), votes_BVV=votes)
    assert ballots(votes, valid).tolist() == [[0, 2, 0, 2, 0]], "padding does not vote"
    selector = made("argmax_union")
    assert choose(selector, scores, valid, [3], False).keep_BV.tolist() == [[False, True, False, True, False]]
    keep = choose(selector, scores, valid, [1], False).keep_BV
    assert keep.tolist() == [[False, True, False, False, False]], "of equal votes the higher score"
    free = choose(made({"type": "argmax_union", "cap": None}), scores, valid, [1], False).keep_BV
    assert free.sum() == 2
    votes[0, :, 4] = 50.0
    assert not choose(selector, scores, valid, [3], False).keep_BV[0, 4], "nobody votes for padding"


def test_union_gate_is_the_probability_of_a_vote() -> None:
    share = draw(2, 6, 6).double().softmax(-1).requires_grad_()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    expected = 1 - (1 - share.masked_fill(~valid[..., None], 0.0)).prod(1)
    assert torch.allclose(any_vote(share, valid), expected.masked_fill(~valid, 0.0), atol=1e-9)
    assert torch.autograd.gradcheck(lambda s: any_vote(s, valid), share, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
def test_union_noise_ends_with_training(noise: str) -> None:
    selector = made({"type": "argmax_union", "noise": noise, "cap": None})
    scores, valid = scored(3, 30)
    calm = choose(selector, scores, valid, [30] * 3, False).keep_BV
    assert not torch.equal(choose(selector, scores, valid, [30] * 3, True).keep_BV, calm)
    selector.set_progress(1.0)
    late = choose(selector, scores, valid, [30] * 3, True)
    assert torch.equal(late.keep_BV, calm)
    assert torch.equal(late.gate_BV, calm.float())


def test_union_without_votes_says_so() -> None:
    with pytest.raises(ValueError, match=r"argmax_union counts votes.*cross_attention with union: true\."):
        choose(made("argmax_union"), Scores(torch.zeros(1, 3)), torch.ones(1, 3).bool(), [1], False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"type": "soft_topk", "relaxation": "gauss"}, "soft_topk has no relaxation 'gauss'; choose one of sigmoid, l"),
        ({"type": "straight_through", "temperature_end": 2.0}, "0 < temperature_end <= temperature_start"),
        ({"type": "gumbel", "temperature_end": 0.0}, "gumbel needs 0 < temperature_end"),
        ({"type": "gumbel_topk", "noise_start": 0.1}, "0 < noise_end <= noise_start"),
        ({"type": "threshold", "cap": 0.5}, "floor in .0, 1. and cap >= 1"),
        ({"type": "learned_budget", "spread": 1.0}, r"spread in \(0, 1\) and at least 2"),
        ({"type": "argmax_union", "noise": "normal"}, "no noise 'normal'; choose one of gumbel, uniform"),
        ({"type": "argmax_union", "cap": 0}, "positive cap"),
        ("soft_topkk", "No selector 'soft_topkk'.*Did you mean soft_topk?"),
    ],
)
def test_errors_name_the_way_out(config: str | dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_part("selector", config)
