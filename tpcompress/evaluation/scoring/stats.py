"""Means over seeds with intervals over seeds and images at once.

Two things would come out otherwise in a repetition: the runs (seeds) and the held-out images. With S seeds whose scores
are x_1 .. x_S, all on the same I images,

    var(mean) = s^2(x) / S  +  var_images(mean of the seeds)

The second term is the bootstrap over images, applied to the seed-averaged answers, so images stay paired over seeds and
between the two sides of a gain. The half width is t x sqrt(var) with Welch-Satterthwaite's degrees of freedom,

    df = var^2 / ( (s^2/S)^2 / (S - 1)  +  var_images^2 / (I - 1) ),

as three seeds alone would need t = 4.3 and the images alone 1.96. S - 1 = 0 leaves the images alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpcompress.evaluation.scoring.scores import Scores

NORMAL = 1.96
T_TABLE = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042,
    math.inf: NORMAL,
}  # fmt: skip
"""Two-sided 95 % quantiles of Student's t, by degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, as a share or a difference of shares.

    Attributes:
        mean: over the seeds.
        half: half width of its 95 % interval.
        seeds: how many.
    """

    mean: float
    half: float
    seeds: int

    @property
    def clear(self) -> bool:
        """The interval excludes zero."""
        return abs(self.mean) > self.half


def score_of(runs: Sequence[Scores]) -> Estimate:
    """Score of a cell over its seeds."""
    return _estimate([run.score for run in runs], pooled(runs).ci95, runs[0].num_images)


def gain_of(runs: Sequence[Scores], others: Sequence[Scores]) -> Estimate:
    """Score of some runs minus that of others, seed by seed and image by image.

    Raises:
        ValueError: not as many others as runs, or answers to other questions.
    """
    if len(others) != len(runs):
        raise ValueError(f"{len(runs)} runs cannot be paired with {len(others)}; give one other for each.")
    _, low, high = pooled(runs).difference(pooled(others))
    deltas = [run.score - replace(other, learnt=run.learnt).score for run, other in zip(runs, others, strict=True)]
    return _estimate(deltas, (high - low) / 2, runs[0].num_images)


def pooled(runs: Sequence[Scores]) -> Scores:
    """The answers of all runs as one: its accuracies are the means of theirs, its images are resampled together.

    Raises:
        ValueError: the runs answered different questions.
    """
    first = runs[0]
    if any(run.names != first.names or not np.array_equal(run.count_IF, first.count_IF) for run in runs):
        raise ValueError("Runs on different questions cannot be averaged; evaluate all on one data set.")
    names = ("right_IF", "count_IF", "right_tokens_IF", "tokens_IF", "loss_IF")
    return replace(first, **{name: np.sum([getattr(run, name) for run in runs], axis=0) for name in names})


def t_quantile(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t: tabulated, and linear in 1/df in between."""
    for (low, t_low), (high, t_high) in zip(T_TABLE.items(), list(T_TABLE.items())[1:], strict=False):
        if freedom <= high:
            share = (1 / low - 1 / max(freedom, low)) / (1 / low - 1 / high)
            return t_low + share * (t_high - t_low)
    return NORMAL


def _estimate(values: Sequence[float], half_images: float, num_images: int) -> Estimate:
    """From the score of every seed and the half width of the interval over images."""
    count = len(values)
    of_images = (half_images / NORMAL) ** 2
    of_seeds = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    total = of_images + of_seeds
    if total == 0:
        return Estimate(float(np.mean(values)), 0.0, count)
    spread = of_images**2 / max(1, num_images - 1) + (of_seeds**2 / (count - 1) if count > 1 else 0.0)
    return Estimate(float(np.mean(values)), t_quantile(total**2 / spread) * math.sqrt(total), count)
