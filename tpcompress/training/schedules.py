"""How many tokens the pruner keeps at a step of training. Every schedule but the random one ends at the plan's budget.

An export has the plan's own budget in any case. A schedule is a factor on the plan's budget: 1 is the plan, 4 is four
times as many tokens (at most all of them), so one schedule serves ratios, counts and every image size. Steps are
counted, never seconds.
"""

from __future__ import annotations

import math
import random

from tpcompress.insertion.plan import Budget


class Schedule:
    """Base class: `factor(progress, draw)`, with progress from 0 to 1 and one shared random number per step."""

    def factor(self, progress: float, draw: float) -> float:
        """Multiple of the plan's budget.

        Args:
            progress: share of the phase that is done: 0 at its first step, 1 at its last.
            draw: uniform in [0, 1), equal on every rank, new at every step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define factor(progress, draw).")

    def budget(self, final: Budget, progress: float, draw: float) -> Budget:
        """The budget at a step."""
        factor = self.factor(progress, draw)
        if final.keep_tokens is not None:
            # Nothing, which a plan may ask of its last stage, stays nothing.
            return Budget(keep_tokens=max(min(1, final.keep_tokens), round(final.keep_tokens * factor)))
        assert final.keep_ratio is not None
        return Budget(keep_ratio=min(1.0, final.keep_ratio * factor))


class Constant(Schedule):
    """The plan's budget from the first step."""

    def factor(self, progress: float, draw: float) -> float:
        return 1.0


class Linear(Schedule):
    """From `start` times the budget down to the budget in a straight line, then constant.

    Args:
        start: multiple of the budget at the first step; large values mean all tokens.
        until: share of the phase at which the plan's budget is reached.
    """

    def __init__(self, start: float = 4.0, until: float = 0.5) -> None:
        self.start, self.until = _checked(start, until)

    def factor(self, progress: float, draw: float) -> float:
        return self.start + (1 - self.start) * min(1.0, progress / self.until)


class Cosine(Schedule):
    """From `start` times the budget down to the budget along half a cosine, then constant. Arguments as `Linear`."""

    def __init__(self, start: float = 4.0, until: float = 0.5) -> None:
        self.start, self.until = _checked(start, until)

    def factor(self, progress: float, draw: float) -> float:
        return 1 + (self.start - 1) * (1 + math.cos(math.pi * min(1.0, progress / self.until))) / 2


class RandomBudget(Schedule):
    """A new budget at every step, log-uniform between `low` and `high` times the plan's: one checkpoint, many budgets.

    Args:
        low: smallest multiple.
        high: largest multiple.
    """

    def __init__(self, low: float = 0.5, high: float = 4.0) -> None:
        if not 0 < low <= high:
            raise ValueError(f"RandomBudget needs 0 < low <= high, got low {low} and high {high}.")
        self.low, self.high = low, high

    def factor(self, progress: float, draw: float) -> float:
        return math.exp(math.log(self.low) + draw * (math.log(self.high) - math.log(self.low)))


def progress_at(step: int, steps: int) -> float:
    """Share that is done at step `step` of a phase of `steps`: 0 at the first, 1 at the last (and only) one."""
    return min(1.0, step / (steps - 1)) if steps > 1 else 1.0


def draw_for(seed: int, *counters: int) -> random.Random:
    """The random numbers of one step: a function of seed and counters alone, so a resumed run draws the same."""
    return random.Random(":".join(map(str, (seed, *counters))))


def _checked(start: float, until: float) -> tuple[float, float]:
    if start < 1 or not 0 < until <= 1:
        raise ValueError(f"A ramp needs start >= 1 and until in (0, 1], got start {start} and until {until}.")
    return start, until
