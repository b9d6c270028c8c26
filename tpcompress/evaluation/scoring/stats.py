"""Statistics of results: bootstrap intervals over images, paired gains, and intervals over seeds and images at once.

Two things would come out otherwise in a repetition: the training runs (seeds) and the held-out images. With S seeds
whose scores are x_1 .. x_S, all on the same I images,

    var(mean) = s^2(x) / S  +  var_images(mean of the seeds)

The second term is the bootstrap over images, applied to the seed-averaged answers, so images stay paired over seeds and
between the two sides of a gain. The half width is t x sqrt(var) with Welch-Satterthwaite's degrees of freedom,

    df = var^2 / ( (s^2/S)^2 / (S - 1)  +  var_images^2 / (I - 1) ),

because three seeds alone would need t = 4.3 and the images alone 1.96. With one seed only the images count.

I images, W draws of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DRAWS = 1000
LEVEL = 0.95
NORMAL = 1.96
T_TABLE = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042,
    math.inf: NORMAL,
}  # fmt: skip
"""Two-sided 95 % quantiles of Student's t, by degrees of freedom."""


class Gain(NamedTuple):
    """A difference of two scores and its 95 % interval."""

    delta: float
    low: float
    high: float

    @property
    def helps(self) -> bool:
        """Above zero, outside the interval."""
        return self.low > 0

    @property
    def hurts(self) -> bool:
        """Below zero, outside the interval."""
        return self.high < 0

    def __str__(self) -> str:
        points = f"{100 * self.delta:+.1f}"
        return points if self.helps else f"worse {points}" if self.hurts else "n.s."


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds: a score, or a difference of scores.

    Attributes:
        mean: mean over the seeds.
        half: half width of its 95 % interval.
        seeds: number of seeds.
        is_gain: it is a difference.
    """

    mean: float
    half: float
    seeds: int
    is_gain: bool = False

    @property
    def clear(self) -> bool:
        """The interval excludes zero."""
        return abs(self.mean) > self.half


# ---------------------------------------------------------------------------------------------------- bootstrap


def draws(num_images: int, seed: int, block: int = 100) -> Iterator[np.ndarray]:
    """How often each image occurs in each draw, in blocks of (`block`, I) to bound the memory."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS // block):
        yield rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=block).astype(np.float64)


def interval(values_W: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the values of all draws; (nan, nan) if none is known."""
    known = values_W[~np.isnan(values_W)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values_I: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of one value per image or repetition."""
    values_I = np.asarray(values_I, dtype=np.float64)
    return interval(np.concatenate([weights @ values_I / len(values_I) for weights in draws(len(values_I), seed)]))


def median_interval(values_I: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of one value per repetition."""
    values_I = np.asarray(values_I, dtype=np.float64)
    drawn_WI = np.random.default_rng(seed).integers(len(values_I), size=(DRAWS, len(values_I)))
    return interval(np.median(values_I[drawn_WI], axis=1))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Elementwise part / whole, nan where the whole is zero."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def known_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last dimension without nan: a rare family may be missing from a draw."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(np.float64))


# ---------------------------------------------------------------------------------------------------- seeds


def estimate(values: Sequence[float], half_images: float, num_images: int, is_gain: bool = False) -> Estimate:
    """The mean over seeds with an interval over seeds and images.

    Args:
        values: score of each seed.
        half_images: half width of the interval of their mean over images.
        num_images: number of images.
        is_gain: the values are differences.
    """
    count = len(values)
    of_images = (half_images / NORMAL) ** 2
    of_seeds = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    total = of_images + of_seeds
    if total == 0:
        return Estimate(float(np.mean(values)), 0.0, count, is_gain)
    spread = of_images**2 / max(1, num_images - 1) + (of_seeds**2 / (count - 1) if count > 1 else 0.0)
    return Estimate(float(np.mean(values)), t_quantile(total**2 / spread) * math.sqrt(total), count, is_gain)


def t_quantile(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t: tabulated, linear in 1/df in between."""
    for (low, t_low), (high, t_high) in zip(T_TABLE.items(), list(T_TABLE.items())[1:], strict=False):
        if freedom <= high:
            share = (1 / low - 1 / max(freedom, low)) / (1 / low - 1 / high)
            return t_low + share * (t_high - t_low)
    return NORMAL
