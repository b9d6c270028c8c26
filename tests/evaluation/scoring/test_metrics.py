"""Metrics: found by being there, and equal to what is counted by hand."""

import numpy as np
import pytest
import torch

from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.evaluation.scoring.metrics import Answers, find_metric, list_metrics
from tpcompress.evaluation.scoring.metrics.base import PERCENT
from tpcompress.evaluation.scoring.scores import Scores


@pytest.fixture
def answers() -> Answers:
    """Three questions with 2, 1 and 3 answer tokens, the last one open; tokens 0, 2, 3 and 5 are right."""
    logits_TC = torch.full((6, 4), -1.0)
    target_T, said_T = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 2, 2, 3, 1, 1])
    logits_TC[torch.arange(6), said_T] = 2.0
    return Answers(logits_TC, target_T, torch.tensor([0, 0, 1, 2, 2, 2]), ["count", "count", "chat"])


@pytest.mark.parametrize(
    ("name", "values", "weights"),
    [
        ("exact_match", [0, 1, 0], [1, 1, 1]),
        ("token_accuracy", [1, 1, 2], [2, 1, 3]),
        ("accuracy", [0, 1, 2], [1, 1, 3]),
    ],
)
def test_answers_are_counted(answers, name, values, weights):
    value_Q, weight_Q = find_metric(name)(answers)
    assert value_Q.float().tolist() == values
    assert weight_Q.tolist() == weights


def test_log_likelihood_is_the_log_probability_of_the_reference(answers):
    value_Q, weight_Q = find_metric("log_likelihood")(answers)
    right, wrong = (x - np.log(np.exp(2) + 3 * np.exp(-1)) for x in (2.0, -1.0))
    assert value_Q.tolist() == pytest.approx([right + wrong, right, 2 * right + wrong], rel=1e-5)
    assert weight_Q.tolist() == [2, 1, 3]


def test_every_metric_is_measured_and_one_is_the_score(vqa, processor, rows):
    scores = evaluate(vqa, processor, rows, metric="log_likelihood")
    of_logits = {name for name in list_metrics() if find_metric(name).reads_logits}
    assert set(scores.sums) == of_logits == {"accuracy", "exact_match", "token_accuracy", "log_likelihood"}
    assert scores.score < 0
    exact = scores.with_metric("exact_match")
    assert exact.score == evaluate(vqa, processor, rows).score
    with pytest.raises(ValueError, match="Scores of log_likelihood and exact_match cannot be paired"):
        scores.difference(exact)


def test_a_metric_that_is_not_there_is_one_line(vqa, processor, rows):
    with pytest.raises(ValueError, match="^No metric 'exact'; known: accuracy, [^\n]*$"):
        evaluate(vqa, processor, rows, metric="exact")
    with pytest.raises(ValueError, match="No metric 'accuracy' in these scores; they have exact_match"):
        Scores(("a",), np.ones((1, 1)), {"exact_match": (np.ones((1, 1)), np.ones((1, 1)))})


def test_units_write_numbers():
    assert (PERCENT.text(0.831), PERCENT.number(None), PERCENT.change(-0.0312)) == ("83.1 %", "–", "-3.1")
    assert find_metric("log_likelihood").unit.text(-0.25) == "-0.250 nats"
