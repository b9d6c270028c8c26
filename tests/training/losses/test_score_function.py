"""The score-function loss against exact expectations."""

import itertools

import pytest
import torch
from training.losses.gate_passes import (
    B,
    answered,
    everything,
)

from tpcompress.training.losses.label import sample_losses
from tpcompress.training.losses.score_function import ScoreFunction, drawn_log_prob, score_function

# ------------------------------------------------------------------ score function


def exact_gradient(scores, cost):
    """d E[mean cost] / d scores, with one token drawn for each of two samples."""
    scores = scores.detach().requires_grad_()
    (scores.softmax(1) * cost).sum(1).mean().backward()
    return scores.grad


@pytest.mark.parametrize("baseline", [None, torch.tensor([5.0, -3.0])])
def test_the_score_function_has_the_gradient_of_the_expected_cost(baseline):
    g = torch.Generator().manual_seed(0)
    scores, cost = torch.randn(2, 3, generator=g).requires_grad_(), torch.randn(2, 3, generator=g) * 3
    mean, own = torch.zeros(2, 3), torch.zeros(2, 3)
    for draw in itertools.product(range(3), repeat=2):
        index = torch.tensor(draw)[:, None]
        log_p, paid = scores.log_softmax(1).gather(1, index)[:, 0], cost.gather(1, index)[:, 0]
        weight = log_p.detach().sum().exp()
        surrogate = score_function(paid, log_p, torch.tensor([True, True]), baseline)
        mean += weight * torch.autograd.grad(surrogate, scores, retain_graph=True)[0]
        # A baseline that knows a sample's own draw is not free: it halves what two samples learn.
        biased = score_function(paid, log_p, torch.tensor([True, True]), paid.mean().expand(2))
        own += weight * torch.autograd.grad(biased, scores, retain_graph=True)[0]
    torch.testing.assert_close(mean, exact_gradient(scores, cost), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own, exact_gradient(scores, cost) / 2, rtol=1e-4, atol=1e-6)


def test_leaving_one_out_lowers_the_variance():
    g = torch.Generator().manual_seed(0)
    cost, scores = torch.rand(8, 3, generator=g) + 10, torch.zeros(8, 3, requires_grad=True)
    found = {"others": [], "nothing": []}
    for _ in range(30):
        index = torch.randint(3, (8, 1), generator=g)
        log_p, paid = scores.log_softmax(1).gather(1, index)[:, 0], cost.gather(1, index)[:, 0]
        for name, baseline in (("others", None), ("nothing", torch.zeros(8))):
            term = score_function(paid, log_p, torch.ones(8, dtype=torch.bool), baseline)
            found[name].append(torch.autograd.grad(term, scores, retain_graph=True)[0])
    spread = {name: torch.stack(values).var(0).mean() for name, values in found.items()}
    assert spread["others"] < spread["nothing"] / 50


def test_draws_of_all_images_belong_to_their_sample():
    here, leaves = everything()
    log_prob, drawn = drawn_log_prob(here)
    p = leaves["log_prob"]
    torch.testing.assert_close(log_prob, torch.stack([p[0] + p[1], p[2], torch.tensor(0.0)]))
    assert drawn.tolist() == [True, True, False]
    cost, _ = sample_losses(here.logits_AC, here.targets_A, here.sample_A, B)
    term = ScoreFunction()(here, None)
    term.backward()
    gap = ((cost[0] - cost[1]) / 2).item()  # the text-only sample does not count
    assert p.grad.tolist() == pytest.approx([gap, gap, -gap])
    assert here.logits_AC.grad is None


def test_a_teacher_as_baseline():
    here, leaves = everything()
    taught = answered(7)
    ScoreFunction("teacher")(here, taught).backward()
    cost = sample_losses(here.logits_AC, here.targets_A, here.sample_A, B)[0]
    known = sample_losses(taught.logits_AC, taught.targets_A, taught.sample_A, B)[0]
    gap = ((cost - known) / 2).tolist()
    assert leaves["log_prob"].grad.tolist() == pytest.approx([gap[0], gap[0], gap[1]])
    with pytest.raises(ValueError, match=r"^Loss 'score_function' cannot use a cached teacher as baseline[^\n]*$"):
        ScoreFunction("teacher")(here, None)


def test_a_sample_alone_has_nothing_to_compare_itself_with():
    log_p = torch.tensor([-1.0], requires_grad=True)
    score_function(torch.tensor([3.0]), log_p, torch.tensor([True])).backward()
    assert log_p.grad.tolist() == [3.0]  # unbiased all the same
