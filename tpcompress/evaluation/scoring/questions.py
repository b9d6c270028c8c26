"""The answers of a test question by question, and their sums by image and family.

Q questions, I images, F question families, K counts of a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Questions:
    """All answered questions, in the order of the data.

    Attributes:
        image_Q: row of the data set.
        family_Q: index of the family.
        right_Q: whether the answer is right, see `Metric.is_right`; teacher-forced: every token is.
        confidence_Q: probability that the model gives to its answer: the product over the tokens of a greedy answer;
            teacher-forced, up to its first wrong token.
        answer_Q: the answer as text; teacher-forced: ids of the predicted tokens up to the first wrong one.
        counts: (K, Q) of every measured metric.
    """

    image_Q: np.ndarray
    family_Q: np.ndarray
    right_Q: np.ndarray
    confidence_Q: np.ndarray
    answer_Q: np.ndarray
    counts: Mapping[str, np.ndarray]

    @classmethod
    def join(cls, parts: list[Questions]) -> Questions:
        """The questions of several batches."""
        names = ("image_Q", "family_Q", "right_Q", "confidence_Q", "answer_Q")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        counts = {name: np.concatenate([part.counts[name] for part in parts], -1) for name in parts[0].counts}
        return cls(**joined, counts=counts)

    def sums(self, values_KQ: np.ndarray, num_images: int, num_families: int) -> tuple[np.ndarray, ...]:
        """K sums (I, F) of values of the questions."""
        found = []
        for values_Q in np.atleast_2d(values_KQ):
            sums_IF = np.zeros((num_images, num_families))
            np.add.at(sums_IF, (self.image_Q, self.family_Q), values_Q)
            found.append(sums_IF)
        return tuple(found)

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a file; `of_arrays` is the inverse."""
        names = ("image_Q", "family_Q", "right_Q", "confidence_Q", "answer_Q")
        found = {f"question.{name}": getattr(self, name) for name in names}
        return found | {f"question.counts.{name}": values for name, values in self.counts.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> Questions | None:
        """The questions of a file; None if it has none."""
        plain = {key.removeprefix("question."): arrays[key] for key in arrays if key.startswith("question.")}
        if not plain:
            return None
        counts = {key.removeprefix("counts."): plain.pop(key) for key in list(plain) if key.startswith("counts.")}
        return cls(**plain, counts=counts)

    def same_as(self, other: Questions) -> bool:
        """Whether both answer the same questions."""
        return np.array_equal(self.image_Q, other.image_Q) and np.array_equal(self.family_Q, other.family_Q)
