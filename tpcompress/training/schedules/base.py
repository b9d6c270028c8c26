"""How many tokens the pruner keeps at a step of training, and before which layer it stands.

An export has the plan's own budget and layer in any case. Most schedules are a factor on the plan's budget: 1 is the
plan, 4 is four times as many tokens (at most all of them), so one schedule serves ratios, counts and every image size.
Steps are counted, never seconds.
"""

from __future__ import annotations

import random
from typing import ClassVar

from tpcompress.insertion.plan import Budget


class Schedule:
    """Base class: `factor(progress, draw)`, with progress from 0 to 1 and one shared random number per step."""

    moves: ClassVar[bool] = False
    """It moves stages to other layers than the plan's."""

    def factor(self, progress: float, draw: float) -> float:
        """Multiple of the plan's budget.

        Args:
            progress: share of the phase that is done: 0 at its first step, 1 at its last.
            draw: uniform in [0, 1), equal on every rank, new at every step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define factor(progress, draw).")

    def budget(self, final: Budget, progress: float, draw: float) -> Budget:
        """The budget at a step."""
        return scaled(final, self.factor(progress, draw))

    def budgets(self, final: Budget, progress: float, draw: float) -> list[Budget]:
        """The budgets at a step, one for each pass through the model; their losses are averaged."""
        return [self.budget(final, progress, draw)]

    def layer(self, final: int, depth: int, progress: float) -> int:
        """The layer before which a stage of the plan's layer `final` stands, in a model of `depth` decoder layers."""
        return final


def scaled(final: Budget, factor: float) -> Budget:
    """A multiple of a budget, of at least one token and at most all."""
    if final.keep_tokens is not None:
        # Nothing, which a plan may ask of its last stage, stays nothing.
        return Budget(keep_tokens=max(min(1, final.keep_tokens), round(final.keep_tokens * factor)))
    assert final.keep_ratio is not None
    return Budget(keep_ratio=min(1.0, final.keep_ratio * factor))


def progress_at(step: int, steps: int) -> float:
    """Share that is done at step `step` of a phase of `steps`: 0 at the first, 1 at the last (and only) one."""
    return min(1.0, step / (steps - 1)) if steps > 1 else 1.0


def draw_for(seed: int, *counters: int) -> random.Random:
    """The random numbers of one step: a function of seed and counters alone, so a resumed run draws the same."""
    return random.Random(":".join(map(str, (seed, *counters))))


def check_ramp(start: float, until: float) -> tuple[float, float]:
    """See that a ramp starts at the budget or above and ends within the phase.

    Raises:
        ValueError: it does not.
    """
    if start < 1 or not 0 < until <= 1:
        raise ValueError(f"A ramp needs start >= 1 and until in (0, 1], got start {start} and until {until}.")
    return start, until
