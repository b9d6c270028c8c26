"""Selectors that choose their own count."""

from __future__ import annotations

import pytest
import torch
from pruners.selector_scores import choose, draw, made, scored

from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.selectors.argmax_union import any_vote, ballots
from tpcompress.pruners.selectors.learned_budget import prefix_probability
from tpcompress.pruners.selectors.threshold import deciles, normal_threshold, within
from tpcompress.pruners.topk import keep_topk

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
