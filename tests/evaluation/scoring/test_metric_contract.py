"""What every registered metric promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tpcompress.evaluation.scoring.metrics import Answers, Reply, find_metric, list_metrics, name_of

OF_LOGITS = [name for name in list_metrics() if find_metric(name).reads_logits]
OF_TEXT = [name for name in list_metrics() if find_metric(name).reads_text]
DESCRIBES = {"pope_yes_rate"}
"""Metrics of which more is not better."""
RIGHT = [
    Reply(text, (text, "another"), "What?\nA. red\nB. blue")
    for text in ("yes", "B", "no", "[10, 10, 30, 30]", "12 red cars drive along the road")
]
"""Answers that equal their reference."""
WRONG = [
    Reply(text, reply.references, reply.prompt) for text, reply in zip(("no", "A", "yes", "7", "x"), RIGHT, strict=True)
]


def answers(questions: list[int], seed: int = 0) -> Answers:
    """Questions with these numbers of answer tokens; a question is the same whatever is beside it."""
    logits, targets, owners = [], [], []
    for number, length in enumerate(questions):
        g = torch.Generator().manual_seed(seed + length)
        logits.append(torch.randn(length, 7, generator=g))
        targets.append(torch.randint(7, (length,), generator=g))
        owners += [number] * length
    return Answers(torch.cat(logits), torch.cat(targets), torch.tensor(owners), ["x"] * len(questions))


def total(metric, replies) -> float:
    return float(metric.aggregate(*np.array([metric.of_reply(reply) for reply in replies]).sum(0)))


@pytest.mark.parametrize("name", OF_LOGITS)
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


@pytest.mark.parametrize("name", OF_LOGITS)
def test_right_tokens_are_better_than_wrong_ones(name: str) -> None:
    metric, given = find_metric(name), answers([3, 1, 5])
    right = torch.nn.functional.one_hot(given.target_T, 7).float() * 9
    best, worst = (
        sum(metric(Answers(logits, given.target_T, given.question_T, given.families))[0].float().tolist())
        for logits in (right, -right)
    )
    assert best > worst


@pytest.mark.parametrize("name", OF_TEXT)
def test_references_are_right_and_better_than_wrong_answers(name: str) -> None:
    metric = find_metric(name)
    assert all(metric.is_right(reply) for reply in RIGHT if metric.of_reply(reply)[1] > 0)
    assert not any(metric.is_right(reply) for reply in WRONG)
    if name not in DESCRIBES:
        assert total(metric, RIGHT) > total(metric, WRONG)
        assert total(metric, RIGHT) == pytest.approx(0.0 if name == "number_error" else 1.0)


@pytest.mark.parametrize("name", OF_TEXT)
def test_an_empty_answer_counts_and_is_wrong(name: str) -> None:
    metric = find_metric(name)
    counts = [metric.of_reply(Reply("", reply.references, reply.prompt)) for reply in RIGHT]
    assert all(np.isfinite(row).all() for row in counts)
    assert len({len(row) for row in counts}) == 1
    assert not any(metric.is_right(Reply("", reply.references)) for reply in RIGHT)


@pytest.mark.parametrize("name", list_metrics())
def test_its_numbers_can_be_written_and_its_name_found(name: str) -> None:
    metric = find_metric(name)
    assert metric.title
    assert metric.unit.text(0.5)
    assert metric.learnt_margin >= 0
    assert metric.reads_logits or metric.reads_text
    assert name_of(metric) == name
    assert all(find_metric(other).reads_text for other in metric.beside)
    with pytest.raises(NotImplementedError):
        metric.of_reply(RIGHT[0]) if not metric.reads_text else type(metric).__mro__[-2].of_reply(metric, RIGHT[0])
