"""Scores of several seeds: their pool, their mean and the paired gain of one group over another, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.stats import Estimate, estimate


def pooled(runs: Sequence[Scores]) -> Scores:
    """The mean of the answers of all runs, image by image: its images are resampled together.

    Raises:
        ValueError: the runs answered different questions.
    """
    first = runs[0]
    if any(run.names != first.names or not np.array_equal(run.count_IF, first.count_IF) for run in runs):
        raise ValueError("Runs on different questions cannot be averaged; evaluate all on one data set.")
    return replace(first, sums={name: _mean([run.sums[name] for run in runs]) for name in first.sums})


def score_of(runs: Sequence[Scores]) -> Estimate:
    """Mean score of the runs."""
    return estimate([run.score for run in runs], pooled(runs).ci95, runs[0].num_images)


def gain_of(runs: Sequence[Scores], others: Sequence[Scores]) -> Estimate:
    """Mean score of some runs minus that of others, paired seed by seed and image by image.

    Raises:
        ValueError: not as many others as runs, or answers to other questions.
    """
    if len(others) != len(runs):
        raise ValueError(f"{len(runs)} runs cannot be paired with {len(others)}; give one other for each.")
    _, low, high = pooled(runs).difference(pooled(others))
    deltas = [run.score - replace(other, learnt=run.learnt).score for run, other in zip(runs, others, strict=True)]
    return estimate(deltas, (high - low) / 2, runs[0].num_images, is_gain=True)


def _mean(runs: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.mean(counts, axis=0) for counts in zip(*runs, strict=True))
