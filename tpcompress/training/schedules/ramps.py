"""Ramps from a larger budget down to the plan's: linear, cosine, or in steps."""

from __future__ import annotations

import math

from tpcompress.training.schedules.base import Schedule, check_ramp


class Linear(Schedule):
    """From `start` times the plan's budget linearly down to the plan's, then constant.

    Args:
        start: multiple of the budget at the first step; a large value starts with all tokens.
        until: share of the phase at which the plan's budget is reached.
    """

    def __init__(self, start: float = 4.0, until: float = 0.5) -> None:
        self.start, self.until = check_ramp(start, until)

    def factor(self, progress: float, draw: float) -> float:
        return self.start + (1 - self.start) * min(1.0, progress / self.until)


class Cosine(Schedule):
    """From `start` times the plan's budget along half a cosine down to the plan's, then constant.

    Source: EViT (arXiv 2202.07800).

    Args:
        start: multiple of the budget at the first step.
        until: share of the phase at which the plan's budget is reached.
    """

    def __init__(self, start: float = 4.0, until: float = 0.5) -> None:
        self.start, self.until = check_ramp(start, until)

    def factor(self, progress: float, draw: float) -> float:
        return 1 + (self.start - 1) * (1 + math.cos(math.pi * min(1.0, progress / self.until))) / 2


class Steps(Schedule):
    """One multiple of the plan's budget after another, for equal shares of the steps before `until`, then the plan's.

    Args:
        factors: multiples of the budget, not rising, and at least 1.
        until: share of the phase at which the plan's budget is reached.

    Raises:
        ValueError: no factors, or factors that rise or are below 1.
    """

    test_arguments = ({"factors": [4, 2]},)

    def __init__(self, factors: list[float], until: float = 0.5) -> None:
        if not factors or any(a < b for a, b in zip(factors, factors[1:], strict=False)):
            raise ValueError(f"Steps needs factors that never rise, got {factors}; e.g. [9, 4, 2].")
        check_ramp(factors[-1], until)
        self.factors, self.until = list(factors), until

    def factor(self, progress: float, draw: float) -> float:
        place = int(progress / self.until * len(self.factors))
        return self.factors[place] if place < len(self.factors) else 1.0
