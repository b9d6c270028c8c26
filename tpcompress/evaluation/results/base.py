"""What is read of a result file: scores with their per-sample values, and everything that two rows must agree in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tpcompress.evaluation.scoring.stats import Gain, draws, interval

TOLERANCE = 1e-3
"""Relative difference up to which a score counts as the mean of its samples."""


@dataclass(frozen=True)
class Model:
    """Which model a result file is of.

    Attributes:
        arm: arm of its row, see `compare.row.ARMS`; None if the file does not tell.
        pruner, keep_tokens, layer: as in `compare.row.Row`.
        title: what the file calls the model.
    """

    arm: str | None
    pruner: str | None = None
    keep_tokens: float | None = None
    layer: int = 0
    title: str = ""


@dataclass(frozen=True, eq=False)
class Measured:
    """One score of one task.

    Attributes:
        harness: name of the harness.
        task: name of the task there.
        metric: name of the metric there.
        score: as the harness gives it.
        samples: value of each sample, by its id; empty if the file has none.
        answers: answer to each sample, by its id.
        content: what decides the samples, by name (version of the task, hash of its documents, limit): rows that differ
            in it are not comparable.
        settings: further settings (prompts, generation, version of the harness): rows that differ in it are marked.
        vision_tokens, retained_tokens: mean tokens of a prompt with an image before and after pruning.
    """

    harness: str
    task: str
    metric: str
    score: float
    samples: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    vision_tokens: float | None = None
    retained_tokens: float | None = None

    @property
    def column(self) -> str:
        """Name of its column."""
        return f"{self.task} {self.metric}"

    @property
    def scale(self) -> float | None:
        """Factor between the mean of the samples and the score; None if the score is no mean of its samples."""
        if not self.samples:
            return None
        mean = float(np.mean(list(self.samples.values())))
        near = (factor for factor in (1.0, 100.0) if abs(factor * mean - self.score) <= TOLERANCE * max(1.0, factor))
        return next(near, None)

    @property
    def ci95(self) -> float | None:
        """Half width of the 95 % interval, by bootstrap over samples; None if the score is no mean of its samples."""
        if self.scale is None:
            return None
        low, high = interval(self._resampled())
        return (high - low) / 2

    def difference(self, other: Measured) -> Gain | None:
        """This score minus another with a paired interval over the same samples; None if one is no mean of samples.

        Raises:
            ValueError: other samples.
        """
        if self.samples and other.samples and self.samples.keys() != other.samples.keys():
            raise ValueError(f"{self.column}: the two files have other samples.")
        if self.scale is None or other.scale is None:
            return None
        return Gain(self.score - other.score, *interval(self._resampled() - other._resampled()))

    def flips(self, other: Measured) -> tuple[float, float] | None:
        """Shares of samples that became wrong and that became right against another; None without both samples."""
        if not self.samples or self.samples.keys() != other.samples.keys():
            return None
        keys = list(self.samples)
        mine, theirs = (np.array([each.samples[key] >= 0.5 for key in keys]) for each in (self, other))
        return float((theirs & ~mine).mean()), float((mine & ~theirs).mean())

    def _resampled(self) -> np.ndarray:
        """The score in every draw, over samples sorted by id, so that equal ids are drawn together."""
        values = np.array([self.samples[key] for key in sorted(self.samples)]) * (self.scale or 1.0)
        return np.concatenate([weights @ values / len(values) for weights in draws(len(values), 0)])


class Reader:
    """Reads the result files of one harness.

    Attributes:
        name: key of its rows in a comparison file.
    """

    name: ClassVar[str]

    def read(self, path: Path, metrics: Sequence[str] = (), **options: Any) -> tuple[Model, list[Measured]]:
        """Read a result file.

        Args:
            path: the file.
            metrics: metrics to read; default: all.
            options: further keys of the row in the comparison file.

        Raises:
            FileNotFoundError, ValueError: no such file, or none that this harness wrote.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement read(path, metrics).")


def number_of(value: Any) -> float | None:
    """A number, the `score` of a mapping, or None."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, int | float) and value == value else None
