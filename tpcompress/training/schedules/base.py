"""The base class of schedules: the token budget, and the layers of the stages, over a phase of training.

An export always has the plan's own budget and layers. Most schedules are a factor on the plan's budget: 1 is the plan,
4 is four times as many tokens (at most all), so one schedule serves ratios, counts and every image size. Progress is
measured in steps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tpcompress.insertion.plan import Budget


class Schedule:
    """Subclasses define `factor`, or override `budget`, `budgets` or `layer`."""

    moves: ClassVar[bool] = False
    """True if the schedule moves stages to other layers than the plan's."""

    test_arguments: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Arguments with which the contract tests build the schedule."""

    def factor(self, progress: float, draw: float) -> float:
        """Multiple of the plan's budget at a step.

        Args:
            progress: share of the phase that is done: 0 at its first step, 1 at its last.
            draw: uniform random number in [0, 1), equal on all ranks, new at every step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define factor(progress, draw).")

    def budget(self, final: Budget, progress: float, draw: float) -> Budget:
        """The budget of a stage at a step, whose budget in the plan is `final`."""
        return scaled(final, self.factor(progress, draw))

    def budgets(self, final: Budget, progress: float, draw: float) -> list[Budget]:
        """The budgets of a stage at a step, one per forward call; the losses of the calls are averaged."""
        return [self.budget(final, progress, draw)]

    def layer(self, final: int, depth: int, progress: float) -> int:
        """The layer of a stage at a step, whose layer in the plan is `final`, in a model of `depth` decoder layers."""
        return final


def scaled(final: Budget, factor: float) -> Budget:
    """A multiple of a budget, at least one token and at most all."""
    if final.keep_tokens is not None:
        # 0 tokens, which the last stage of a plan may keep, remain 0.
        return Budget(keep_tokens=max(min(1, final.keep_tokens), round(final.keep_tokens * factor)))
    assert final.keep_ratio is not None
    return Budget(keep_ratio=min(1.0, final.keep_ratio * factor))


def progress_at(step: int, steps: int) -> float:
    """Progress at step `step` of a phase of `steps`: 0 at the first step, 1 at the last (or only) one."""
    return min(1.0, step / (steps - 1)) if steps > 1 else 1.0


def draw_for(seed: int, *counters: int) -> random.Random:
    """The random number generator of one step, from seed and counters only, so that a resumed run draws the same."""
    return random.Random(":".join(map(str, (seed, *counters))))


def check_ramp(start: float, until: float) -> tuple[float, float]:
    """The arguments, if a ramp starts at or above the budget and ends within the phase.

    Raises:
        ValueError: `start` below 1, or `until` outside (0, 1].
    """
    if start < 1 or not 0 < until <= 1:
        raise ValueError(f"A ramp needs start >= 1 and until in (0, 1], got start {start} and until {until}.")
    return start, until
