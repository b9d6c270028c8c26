"""What every registered metric promises."""

from __future__ import annotations

import pytest
import torch

from tpcompress.evaluation.scoring.metrics import Answers, find_metric, list_metrics


def answers(questions: list[int], seed: int = 0) -> Answers:
    """Questions with these numbers of answer tokens; a question is the same whatever is beside it."""
    logits, targets, owners = [], [], []
    for number, length in enumerate(questions):
        g = torch.Generator().manual_seed(seed + length)
        logits.append(torch.randn(length, 7, generator=g))
        targets.append(torch.randint(7, (length,), generator=g))
        owners += [number] * length
    return Answers(torch.cat(logits), torch.cat(targets), torch.tensor(owners), ["x"] * len(questions))


@pytest.mark.parametrize("name", list_metrics())
def test_a_question_counts_alone(name: str) -> None:
    metric = find_metric(name)
    value_Q, weight_Q = metric(answers([3, 1, 5]))
    assert value_Q.shape == weight_Q.shape == (3,)
    assert value_Q.float().isfinite().all()
    assert (weight_Q > 0).all()
    for number, length in enumerate([3, 1, 5]):
        alone, weight = metric(answers([length]))
        assert alone[0].item() == pytest.approx(value_Q[number].item(), rel=1e-5)
        assert weight[0] == weight_Q[number]


@pytest.mark.parametrize("name", list_metrics())
def test_right_answers_are_better_than_wrong_ones(name: str) -> None:
    metric, given = find_metric(name), answers([3, 1, 5])
    right = torch.nn.functional.one_hot(given.target_T, 7).float() * 9
    best, worst = (
        sum(metric(Answers(logits, given.target_T, given.question_T, given.families))[0].float().tolist())
        for logits in (right, -right)
    )
    assert best > worst


@pytest.mark.parametrize("name", list_metrics())
def test_its_numbers_can_be_written(name: str) -> None:
    metric = list_metrics()[name]
    assert metric.title
    assert metric.unit.text(0.5)
    assert metric.learnt_margin >= 0
