"""What an evaluation says: answers right per image and family, and intervals by resampling images.

I images, F question families, W draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

OPEN_FAMILY = "chat"
"""Family of open answers: there is no exact match, so its accuracy is that of the answer's tokens."""

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Scores:
    """Sums over the questions of each image, by family. Accuracies are shares in [0, 1].

    Attributes:
        names: the F families.
        right_IF: conversations with every answer token right.
        count_IF: conversations.
        right_tokens_IF: answer tokens right, end tokens included; zero if the answers were generated.
        tokens_IF: answer tokens; zero if the answers were generated.
        loss_IF: summed cross entropy (nats) of the answer tokens; zero if the answers were generated.
        learnt: families that `score` averages; None for all.
        skipped: images left out because their row is broken.
        seed: of the bootstrap; equal seeds draw equal images, so that differences are paired.
    """

    names: tuple[str, ...]
    right_IF: np.ndarray
    count_IF: np.ndarray
    right_tokens_IF: np.ndarray
    tokens_IF: np.ndarray
    loss_IF: np.ndarray
    learnt: tuple[str, ...] | None = None
    skipped: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.learnt or ()) - set(self.names))
        if unknown:
            raise ValueError(f"learnt names {', '.join(unknown)}, but the data has {', '.join(self.names)}.")

    # ------------------------------------------------------------------ estimates

    @property
    def families(self) -> dict[str, float]:
        """Accuracy of each family: exact match, or token accuracy of open answers."""
        return self._by_name(_ratio(self._gained_IF.sum(0), self._asked_IF.sum(0)))

    @property
    def counts(self) -> dict[str, int]:
        """Conversations of each family."""
        return {name: int(n) for name, n in zip(self.names, self.count_IF.sum(0), strict=True)}

    @property
    def exact_match(self) -> dict[str, float]:
        """Share of conversations with every answer token right."""
        return self._by_name(_ratio(self.right_IF.sum(0), self.count_IF.sum(0)))

    @property
    def token_accuracy(self) -> dict[str, float]:
        """Share of answer tokens right, given those before; nan if the answers were generated."""
        return self._by_name(_ratio(self.right_tokens_IF.sum(0), self.tokens_IF.sum(0)))

    @property
    def answer_loss(self) -> dict[str, float]:
        """Mean cross entropy (nats) of an answer token; nan if the answers were generated."""
        return self._by_name(_ratio(self.loss_IF.sum(0), self.tokens_IF.sum(0)))

    @property
    def num_images(self) -> int:
        """Images that were asked about."""
        return int((self.count_IF.sum(1) > 0).sum())

    @property
    def score(self) -> float:
        """Mean accuracy of the learnt families; nan if there is none."""
        return float(_mean(_ratio(self._gained_IF.sum(0), self._asked_IF.sum(0))[self._learnt_columns]))

    @cached_property
    def ci95(self) -> float:
        """Half width of the score's 95 % interval: percentile bootstrap over images, all questions of one together."""
        low, high = _interval(_mean(self._resampled_WF[:, self._learnt_columns]))
        return (high - low) / 2

    # ------------------------------------------------------------------ comparisons

    def difference(self, other: Scores) -> tuple[float, float, float]:
        """Score of this minus the other's on the same images: (delta, low, high), a paired 95 % interval.

        Both are averaged over this one's learnt families.

        Raises:
            ValueError: the two are not answers to the same questions.
        """
        self._check_same_questions(other)
        columns = self._learnt_columns
        delta_W = _mean(self._resampled_WF[:, columns]) - _mean(other._resampled_WF[:, columns])
        return (self.score - replace(other, learnt=self.learnt).score, *_interval(delta_W))

    def family_differences(self, other: Scores) -> dict[str, tuple[float, float, float]]:
        """`difference`, family by family."""
        self._check_same_questions(other)
        delta_WF = self._resampled_WF - other._resampled_WF
        mine, theirs = self.families, other.families
        return {name: (mine[name] - theirs[name], *_interval(delta_WF[:, i])) for i, name in enumerate(self.names)}

    def with_learnt(self, learnt: Sequence[str] | None) -> Scores:
        """The same answers, averaged over other families."""
        return replace(self, learnt=None if learnt is None else tuple(learnt))

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write an .npz file, so that an interrupted comparison can still pair its images."""
        arrays = {name: value for name, value in vars(self).items() if name.endswith("_IF")}
        learnt = np.array([] if self.learnt is None else self.learnt, dtype=str)
        notes = np.array([self.skipped, self.seed, self.learnt is None])
        with open(path, "wb") as file:
            np.savez_compressed(file, names=np.array(self.names, dtype=str), learnt=learnt, notes=notes, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No scores at {path}; give a file that Scores.save wrote.")
        with np.load(path) as file:
            skipped, seed, averages_all = (int(n) for n in file["notes"])
            learnt = None if averages_all else tuple(file["learnt"].tolist())
            arrays = {name: file[name] for name in file.files if name.endswith("_IF")}
            return cls(tuple(file["names"].tolist()), **arrays, learnt=learnt, skipped=skipped, seed=seed)

    # ------------------------------------------------------------------ inside

    @property
    def _open_F(self) -> np.ndarray:
        return np.array([name == OPEN_FAMILY for name in self.names], dtype=bool) & (self.tokens_IF.sum(0) > 0)

    @property
    def _gained_IF(self) -> np.ndarray:
        return np.where(self._open_F, self.right_tokens_IF, self.right_IF)

    @property
    def _asked_IF(self) -> np.ndarray:
        return np.where(self._open_F, self.tokens_IF, self.count_IF)

    @property
    def _learnt_columns(self) -> list[int]:
        return [i for i, name in enumerate(self.names) if self.learnt is None or name in self.learnt]

    @cached_property
    def _resampled_WF(self) -> np.ndarray:
        """Family accuracies in every draw."""
        gained_IF, asked_IF = self._gained_IF, self._asked_IF
        parts = [_ratio(w @ gained_IF, w @ asked_IF) for w in _draws(len(asked_IF), self.seed)]
        return np.concatenate(parts)

    def _by_name(self, values_F: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.names, values_F, strict=True)}

    def _check_same_questions(self, other: Scores) -> None:
        same = self.names == other.names and self.seed == other.seed and np.array_equal(self.count_IF, other.count_IF)
        if not same:
            raise ValueError(
                f"Scores of different questions cannot be paired: {int(self.count_IF.sum())} on {len(self.count_IF)} "
                f"images and {int(other.count_IF.sum())} on {len(other.count_IF)}; evaluate both on one data set."
            )


def learnt_families(dense: Scores, blind: Scores, floor: float = 0.1) -> list[str]:
    """Families in which the image matters to the dense base: the others say nothing about pruning.

    Args:
        dense: the base as it is.
        blind: the same model on blanked images.
        floor: how far, as a share, dense must be above blind; and the paired interval must exclude zero.
    """
    differences = dense.family_differences(blind)
    return [name for name, (delta, low, _) in differences.items() if delta >= floor and low > 0]


def _draws(num_images: int, seed: int, block: int = 100) -> Iterator[np.ndarray]:
    """How often each image occurs in each draw, in blocks of (`block`, I) so that memory stays small."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS // block):
        yield rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=block).astype(np.float64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of the last dimension over what is known: a rare family may be missing from a draw."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(np.float64))


def _interval(values_W: np.ndarray) -> tuple[float, float]:
    known = values_W[~np.isnan(values_W)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
