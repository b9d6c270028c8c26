"""Several budgets over training, for one checkpoint that serves many: random ones, or a fixed set in every step."""

from __future__ import annotations

import math

from tpcompress.insertion.plan import Budget
from tpcompress.training.schedules.base import Schedule, scaled


class RandomBudget(Schedule):
    """A random budget at every step, between `low` and `high` times the plan's.

    Args:
        low: smallest multiple.
        high: largest multiple.
        log: draw log-uniformly instead of uniformly, which favours large budgets.

    Raises:
        ValueError: the bounds are not 0 < low <= high.
    """

    def __init__(self, low: float = 0.5, high: float = 4.0, log: bool = True) -> None:
        if not 0 < low <= high:
            raise ValueError(f"{type(self).__name__} needs 0 < low <= high, got low {low} and high {high}.")
        self.low, self.high, self.log = low, high, log

    def factor(self, progress: float, draw: float) -> float:
        if not self.log:
            return self.low + draw * (self.high - self.low)
        return math.exp(math.log(self.low) + draw * (math.log(self.high) - math.log(self.low)))


class Sandwich(RandomBudget):
    """Three forward calls per step: the largest budget, the smallest, and a random one between.

    Source: universally slimmable networks (arXiv 1903.05134, section 3.2).

    Args:
        low: smallest multiple of the plan's budget.
        high: largest multiple.
        log: draw the third budget log-uniformly instead of uniformly.
    """

    def budgets(self, final: Budget, progress: float, draw: float) -> list[Budget]:
        return [scaled(final, factor) for factor in (self.high, self.low, self.factor(progress, draw))]


class Matryoshka(Schedule):
    """One forward call per multiple of the budget in every step.

    Source: Matryoshka multimodal models (M3, arXiv 2405.17430).

    Args:
        factors: multiples of the plan's budget.

    Raises:
        ValueError: no factors, or a factor that is not above 0.
    """

    test_arguments = ({"factors": [2, 0.5, 1]},)

    def __init__(self, factors: list[float]) -> None:
        if not factors or min(factors) <= 0:
            raise ValueError(f"Matryoshka needs factors above 0, got {factors}; e.g. [4, 1, 0.25].")
        self.factors = list(factors)

    def factor(self, progress: float, draw: float) -> float:
        return self.factors[int(draw * len(self.factors))]

    def budgets(self, final: Budget, progress: float, draw: float) -> list[Budget]:
        return [scaled(final, factor) for factor in self.factors]
