"""What accuracy hides: answers that flip against the dense model, calibration, and scores on a part of the questions.

Q questions, I images, W draws of the bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torchmetrics.functional.classification import binary_calibration_error

from tpcompress.evaluation.scoring.questions import Questions
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.stats import draws, interval, ratio

BINS = 15


@dataclass(frozen=True)
class Flips:
    """Questions whose answer changed against another model, as shares of all questions.

    Attributes:
        rate: right became wrong or wrong became right; lost + gained. A model of equal accuracy may have many.
        ci95: half width of the rate's 95 % interval over images.
        lost: right became wrong.
        gained: wrong became right.
        changed: the answer is another one, right or wrong. Teacher-forced answers are known up to their first wrong
            token, so later changes of a wrong answer are not seen.
    """

    rate: float
    ci95: float
    lost: float
    gained: float
    changed: float


@dataclass(frozen=True)
class Calibration:
    """How far the confidence of answers is from their accuracy.

    Attributes:
        error: expected calibration error over 15 bins of equal width: mean of |accuracy - confidence| over the bins,
            weighted by their questions.
        ci95: half width of its 95 % interval over images.
        gap: mean confidence minus accuracy; above zero the model is too sure.
    """

    error: float
    ci95: float
    gap: float


def flips(scores: Scores, dense: Scores) -> Flips:
    """Flips of a model against the dense one.

    Raises:
        ValueError: the scores have no questions, or not the same ones.
    """
    mine, theirs = _questions(scores), _questions(dense)
    if not mine.same_as(theirs):
        raise ValueError("Flips compare answers to the same questions; evaluate both models on one data set.")
    lost_Q, gained_Q = theirs.right_Q & ~mine.right_Q, mine.right_Q & ~theirs.right_Q
    parts = np.stack([lost_Q | gained_Q, lost_Q, gained_Q, mine.answer_Q != theirs.answer_Q]).astype(float)
    parts_I = _by_image(mine, np.concatenate([parts, np.ones((1, len(lost_Q)))]), len(scores.count_IF))
    low, high = interval(
        np.concatenate([ratio(w @ parts_I[0], w @ parts_I[-1]) for w in draws(parts_I.shape[1], scores.seed)])
    )
    return Flips(float(parts[0].mean()), (high - low) / 2, *(float(part.mean()) for part in parts[1:]))


def calibration(scores: Scores) -> Calibration:
    """Calibration of a model's answers.

    Raises:
        ValueError: the scores have no questions.
    """
    asked = _questions(scores)
    confidence_Q, right_Q = np.clip(asked.confidence_Q, 0.0, 1.0), asked.right_Q.astype(float)
    error = binary_calibration_error(torch.tensor(confidence_Q), torch.tensor(right_Q).long(), n_bins=BINS, norm="l1")
    # In a draw, too, the error is the sum over the bins of |right - confident| over the number of questions.
    bin_Q = np.minimum((confidence_Q * BINS).astype(int), BINS - 1)
    excess = np.zeros((BINS, len(bin_Q)))
    excess[bin_Q, np.arange(len(bin_Q))] = right_Q - confidence_Q
    images = len(scores.count_IF)
    excess_I, number_I = _by_image(asked, excess, images), _by_image(asked, np.ones((1, len(bin_Q))), images)[0]
    drawn = [ratio(np.abs(w @ excess_I.T).sum(1), w @ number_I) for w in draws(images, scores.seed)]
    low, high = interval(np.concatenate(drawn))
    return Calibration(float(error), (high - low) / 2, float((confidence_Q - right_Q).mean()))


def weighted(scores: Scores, weight_Q: np.ndarray) -> Scores:
    """The scores with every question counted so many times; 0 leaves it out.

    Raises:
        ValueError: the scores have no questions.
    """
    asked, shape = _questions(scores), scores.count_IF.shape
    sums = {name: asked.sums(counts_KQ * weight_Q, *shape) for name, counts_KQ in asked.counts.items()}
    (count_IF,) = asked.sums(weight_Q, *shape)
    return replace(scores, sums=sums, count_IF=count_IF, questions=None)


@dataclass(frozen=True, eq=False)
class HardSubset:
    """Questions that the dense model gets wrong on degraded images, chosen and scored crosswise.

    There are two degradations of the same strength. The questions that are wrong under one form a half of the subset;
    the degraded model is scored on it with its answers under the other, and every other model with its own answers.
    So no model is scored on questions that its own mistakes selected. (Chosen by the mistakes of the one degraded model
    that is then scored, this would have 0 % by construction, and any other model more by chance alone.)

    Attributes:
        first, second: answers of the dense model under the two degradations.
    """

    first: Scores
    second: Scores

    @property
    def weight_Q(self) -> np.ndarray:
        """In how many of the halves each question is."""
        return np.sum([~_questions(half).right_Q for half in (self.first, self.second)], axis=0, dtype=float)

    @property
    def size(self) -> int:
        """Questions in at least one half."""
        return int((self.weight_Q > 0).sum())

    def of(self, scores: Scores) -> Scores:
        """A model's scores on the subset; a question of both halves counts twice."""
        return weighted(scores, self.weight_Q)

    @property
    def degraded(self) -> Scores:
        """The dense model on degraded images: each half with the answers under the other degradation."""
        wrong_1, wrong_2 = (~_questions(half).right_Q for half in (self.first, self.second))
        a, b = weighted(self.second, wrong_1.astype(float)), weighted(self.first, wrong_2.astype(float))
        sums = {name: tuple(x + y for x, y in zip(a.sums[name], b.sums[name], strict=True)) for name in a.sums}
        return replace(a, sums=sums, count_IF=a.count_IF + b.count_IF)


def _questions(scores: Scores) -> Questions:
    if scores.questions is None:
        raise ValueError("These scores have no single questions; evaluate again.")
    return scores.questions


def _by_image(asked: Questions, values: np.ndarray, num_images: int) -> np.ndarray:
    """(K, I): values (K, Q) summed by image."""
    found = np.zeros((len(values), num_images))
    for index, values_Q in enumerate(values):
        np.add.at(found[index], asked.image_Q, values_Q)
    return found
