"""What selectors share whose gates sharpen as training goes on."""

from __future__ import annotations

from tpcompress.pruners.gate_components import Selector


class Annealed(Selector):
    """A selector with a temperature that falls from `temperature_start` to `temperature_end` in equal ratios."""

    def __init__(self, temperature_start: float, temperature_end: float) -> None:
        """Keep the two ends.

        Raises:
            ValueError: they are not positive, or the temperature would rise.
        """
        super().__init__()
        if not 0 < temperature_end <= temperature_start:
            raise ValueError(
                f"{self.name} needs 0 < temperature_end <= temperature_start, got {temperature_end} and "
                f"{temperature_start}."
            )
        self.temperature_start, self.temperature_end = temperature_start, temperature_end

    @property
    def temperature(self) -> float:
        """T = start (end / start)^progress."""
        return float(self.temperature_start * (self.temperature_end / self.temperature_start) ** self.progress)
