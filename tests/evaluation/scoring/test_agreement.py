"""Flips, calibration and the hard subset against loops and simulated models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryCalibrationError

from tpcompress.evaluation.scoring.agreement import HardSubset, calibration, flips, weighted
from tpcompress.evaluation.scoring.questions import Questions
from tpcompress.evaluation.scoring.scores import Scores


def make(right, confidence=None, image=None, answers=None) -> Scores:
    """Scores of one family, one question per image by default."""
    right = np.asarray(right, dtype=bool)
    image = np.arange(len(right)) if image is None else np.asarray(image)
    confidence = np.full(len(right), 0.5) if confidence is None else np.asarray(confidence)
    answers = right.astype(str) if answers is None else np.asarray(answers)
    counts = {"exact_match": np.stack([right.astype(float), np.ones(len(right))])}
    asked = Questions(image, np.zeros(len(right), dtype=int), right, confidence, answers, counts)
    shape = (int(image.max()) + 1, 1)
    (count_IF,) = asked.sums(np.ones((1, len(right))), *shape)
    sums = {"exact_match": asked.sums(counts["exact_match"], *shape)}
    return Scores(("all",), count_IF, sums, "exact_match", questions=asked)


def test_flips_are_counted_in_both_directions() -> None:
    dense, pruned = make([1, 1, 1, 0, 0], answers=list("abcde")), make([1, 0, 0, 1, 0], answers=list("axyzw"))
    found = flips(pruned, dense)
    assert (found.rate, found.lost, found.gained, found.changed) == pytest.approx((0.6, 0.4, 0.2, 0.8))
    assert pruned.score - dense.score == pytest.approx(found.gained - found.lost)
    same = flips(dense, dense)
    assert (same.rate, same.ci95, same.changed) == (0, 0, 0)
    with pytest.raises(ValueError, match="Flips compare answers to the same questions"):
        flips(pruned, make([1, 1]))


def test_the_interval_of_flips_is_that_of_images() -> None:
    rng = np.random.default_rng(0)
    dense, pruned = np.ones(400), rng.random(400) < 0.7
    once = flips(make(pruned), make(dense))
    assert once.ci95 == pytest.approx(1.96 * np.sqrt(0.3 * 0.7 / 400), rel=0.15)
    image = np.repeat(np.arange(400), 3)
    assert flips(make(np.repeat(pruned, 3), image=image), make(np.ones(1200), image=image)).ci95 == once.ci95


def test_calibration_error_is_that_of_a_loop_and_of_torchmetrics() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.random(300)
    right = rng.random(300) < confidence**2
    found = calibration(make(right, confidence))
    loop = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        loop += abs(right[inside].sum() - confidence[inside].sum()) / 300
    library = BinaryCalibrationError(n_bins=15, norm="l1")
    library.update(torch.tensor(confidence), torch.tensor(right).long())
    assert found.error == pytest.approx(loop) == pytest.approx(float(library.compute()))
    assert found.gap == pytest.approx(confidence.mean() - right.mean())
    assert 0 < found.ci95 < 0.1
    assert calibration(make([1, 1, 0, 0], [1, 1, 0, 0])).error == 0


def test_weights_leave_questions_out() -> None:
    scores = make([1, 0, 1, 1])
    part = weighted(scores, np.array([1, 1, 0, 0]))
    assert (part.score, part.num_images) == (0.5, 2)
    assert weighted(scores, np.ones(4)).ci95 == scores.ci95


def test_a_hard_subset_favours_nobody() -> None:
    """Models that answer at random alike are equal on the crossed subset; the naive one gives the chooser nothing."""
    rng = np.random.default_rng(2)
    first, second, pruned = (make(rng.random(4000) < 0.6) for _ in range(3))
    hard = HardSubset(first, second)
    wrong = ~first.questions.right_Q
    naive = weighted(first, wrong.astype(float)).score, weighted(pruned, wrong.astype(float)).score
    assert naive == (0.0, pytest.approx(0.6, abs=0.04))
    assert hard.degraded.score == pytest.approx(hard.of(pruned).score, abs=0.04)
    assert hard.size == (wrong | ~second.questions.right_Q).sum()


def test_a_hard_subset_shows_what_needs_detail() -> None:
    hard_Q = np.arange(400) < 100
    blurred, dense = ~hard_Q, np.ones(400, dtype=bool)
    found = HardSubset(make(blurred), make(blurred))
    assert (found.size, found.degraded.score, found.of(make(dense)).score) == (100, 0.0, 1.0)


def test_scores_keep_their_questions_in_a_file(tmp_path) -> None:
    scores = make([1, 0, 1], [0.9, 0.2, 0.4], answers=["red", "blue", "ä"])
    scores.save(tmp_path / "scores.npz")
    again = Scores.load(tmp_path / "scores.npz")
    assert again.questions is not None
    assert again.questions.answer_Q.tolist() == ["red", "blue", "ä"]
    assert flips(again, scores).changed == 0
    assert calibration(again) == calibration(scores)
