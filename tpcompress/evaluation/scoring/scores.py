"""Result of an evaluation: sums of every metric per image and family, and intervals by resampling images.

I images, F question families, W draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tpcompress.evaluation.scoring.metrics import find_metric
from tpcompress.evaluation.scoring.questions import Questions
from tpcompress.evaluation.scoring.stats import Gain, draws, interval, known_mean


@dataclass(frozen=True, eq=False)
class Scores:
    """Values and weights of every metric, summed over the questions of each image, by family.

    Attributes:
        names: the F families.
        count_IF: number of questions.
        sums: counts (I, F) of each metric, mostly value and weight; a score is the metric's `aggregate` of their sums.
        metric: the metric of `score` and `families`.
        learnt: families that `score` averages; None for all.
        skipped: images left out because their row is broken.
        seed: seed of the bootstrap; equal seeds draw equal images, so that differences are paired.
        questions: the answers one by one; None if they were not kept.

    Raises:
        ValueError: an unknown family is listed as learnt, or the metric was not measured.
    """

    names: tuple[str, ...]
    count_IF: np.ndarray
    sums: Mapping[str, tuple[np.ndarray, ...]]
    metric: str = "accuracy"
    learnt: tuple[str, ...] | None = None
    skipped: int = 0
    seed: int = 0
    questions: Questions | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.learnt or ()) - set(self.names))
        if unknown:
            raise ValueError(f"learnt names {', '.join(unknown)}, but the data has {', '.join(self.names)}.")
        self._of(self.metric)

    # ------------------------------------------------------------------ estimates

    @property
    def families(self) -> dict[str, float]:
        """The metric in each family."""
        return self.by_family(self.metric)

    def by_family(self, metric: str) -> dict[str, float]:
        """Any measured metric in each family; nan in one without questions."""
        return self._by_name(find_metric(metric).aggregate(*(sums_IF.sum(0) for sums_IF in self._of(metric))))

    def overall(self, metric: str) -> float:
        """Any measured metric over all questions, whatever their family."""
        return float(find_metric(metric).aggregate(*(np.asarray(sums_IF.sum()) for sums_IF in self._of(metric))))

    @property
    def value_IF(self) -> np.ndarray:
        """Summed values of the metric."""
        return self.sums[self.metric][0]

    @property
    def weight_IF(self) -> np.ndarray:
        """Summed weights of the metric."""
        return self.sums[self.metric][1]

    @property
    def counts(self) -> dict[str, int]:
        """Questions of each family."""
        return {name: int(n) for name, n in zip(self.names, self.count_IF.sum(0), strict=True)}

    @property
    def num_counted(self) -> int:
        """Questions that count in the score: those that the metric applies to."""
        total = int(self.count_IF.sum())
        if self.questions is None or not total:
            return total
        alone_Q = find_metric(self.metric).aggregate(*self.questions.counts[self.metric])
        return int((~np.isnan(alone_Q)).sum())

    @property
    def left_out_note(self) -> str:
        """How many questions count, as a sentence; empty if all do."""
        total, counted = int(self.count_IF.sum()), self.num_counted
        return "" if counted == total else f"Only {counted} of {total} questions count in {self.metric}."

    @property
    def num_images(self) -> int:
        """Rows with at least one question."""
        return int((self.count_IF.sum(1) > 0).sum())

    @property
    def score(self) -> float:
        """Mean of the learnt families; nan if there is none."""
        by_family = np.array(list(self.families.values()))
        return float(known_mean(by_family[self._learnt_columns]))

    @cached_property
    def ci95(self) -> float:
        """Half width of the score's 95 % interval: percentile bootstrap over images, all questions of one together."""
        low, high = interval(known_mean(self._resampled_WF[:, self._learnt_columns]))
        return (high - low) / 2

    # ------------------------------------------------------------------ comparisons

    def difference(self, other: Scores) -> Gain:
        """Score of this minus the other's on the same images, with a paired 95 % interval.

        Both are averaged over the learnt families of this one.

        Raises:
            ValueError: the two are not answers to the same questions, or of different metrics.
        """
        self._check_same_questions(other)
        columns = self._learnt_columns
        delta_W = known_mean(self._resampled_WF[:, columns]) - known_mean(other._resampled_WF[:, columns])
        return Gain(self.score - replace(other, learnt=self.learnt).score, *interval(delta_W))

    def family_differences(self, other: Scores) -> dict[str, Gain]:
        """`difference`, family by family."""
        self._check_same_questions(other)
        delta_WF = self._resampled_WF - other._resampled_WF
        mine, theirs = self.families, other.families
        return {name: Gain(mine[name] - theirs[name], *interval(delta_WF[:, i])) for i, name in enumerate(self.names)}

    def with_learnt(self, learnt: Sequence[str] | None) -> Scores:
        """The same answers, averaged over other families."""
        return replace(self, learnt=None if learnt is None else tuple(learnt))

    def with_metric(self, metric: str) -> Scores:
        """The same answers, counted by another metric."""
        return replace(self, metric=metric)

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write an .npz file, from which `load` makes equal scores."""
        arrays: dict[str, Any] = {"names": np.array(self.names, dtype=str), "metric": np.array(self.metric)}
        arrays |= {"learnt": np.array([] if self.learnt is None else self.learnt, dtype=str)}
        arrays |= {"notes": np.array([self.skipped, self.seed, self.learnt is None]), "count_IF": self.count_IF}
        for name, counts in self.sums.items():
            arrays |= {f"sums.{index}.{name}": sums_IF for index, sums_IF in enumerate(counts)}
        arrays |= {} if self.questions is None else self.questions.arrays()
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file of another layout.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No scores at {path}; give a file that Scores.save wrote.")
        with np.load(path) as file:
            if "metric" not in file.files or not any(key.startswith("sums.0.") for key in file.files):
                raise ValueError(f"{path} was written by an earlier version of tpcompress; evaluate again.")
            arrays = {key: file[key] for key in file.files}
        skipped, seed, averages_all = (int(n) for n in arrays["notes"])
        learnt = None if averages_all else tuple(arrays["learnt"].tolist())
        sums: dict[str, tuple[np.ndarray, ...]] = {}
        for key in sorted((k for k in arrays if k.startswith("sums.")), key=lambda k: int(k.split(".")[1])):
            name = key.split(".", 2)[2]
            sums[name] = (*sums.get(name, ()), arrays[key])
        names, metric = tuple(arrays["names"].tolist()), str(arrays["metric"])
        questions = Questions.of_arrays(arrays)
        return cls(names, arrays["count_IF"], sums, metric, learnt, skipped, seed, questions)

    # ------------------------------------------------------------------ inside

    def _of(self, metric: str) -> tuple[np.ndarray, ...]:
        if metric not in self.sums:
            raise ValueError(f"No metric '{metric}' in these scores; they have {', '.join(self.sums)}.")
        return self.sums[metric]

    @property
    def _learnt_columns(self) -> list[int]:
        return [i for i, name in enumerate(self.names) if self.learnt is None or name in self.learnt]

    @cached_property
    def _resampled_WF(self) -> np.ndarray:
        """The metric of each family in every draw."""
        metric, sums = find_metric(self.metric), self._of(self.metric)
        drawn = draws(len(self.count_IF), self.seed)
        return np.concatenate([metric.aggregate(*(weights @ sums_IF for sums_IF in sums)) for weights in drawn])

    def _by_name(self, values_F: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.names, values_F, strict=True)}

    def _check_same_questions(self, other: Scores) -> None:
        same = self.names == other.names and self.seed == other.seed and np.array_equal(self.count_IF, other.count_IF)
        if not same:
            raise ValueError(
                f"Scores of different questions cannot be paired: {int(self.count_IF.sum())} on {len(self.count_IF)} "
                f"images and {int(other.count_IF.sum())} on {len(other.count_IF)}; evaluate both on one data set."
            )
        if self.metric != other.metric:
            raise ValueError(f"Scores of {self.metric} and {other.metric} cannot be paired; choose one metric.")


def learnt_families(dense: Scores, blind: Scores, margin: float | None = None) -> list[str]:
    """Families in which the image matters to the dense base: the others show nothing about pruning.

    Args:
        dense: scores of the base.
        blind: scores of the base on blanked images.
        margin: how far dense must be above blind, beside a paired interval that excludes zero; default: the metric's.
    """
    margin = find_metric(dense.metric).learnt_margin if margin is None else margin
    differences = dense.family_differences(blind)
    return [name for name, (delta, low, _) in differences.items() if delta >= margin and low > 0]
