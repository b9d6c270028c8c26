"""The plan's budget from the first step."""

from __future__ import annotations

from tpcompress.training.schedules.base import Schedule


class Constant(Schedule):
    """The plan's budget from the first step."""

    def factor(self, progress: float, draw: float) -> float:
        return 1.0
