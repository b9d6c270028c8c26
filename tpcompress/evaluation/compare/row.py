"""A row of a comparison, and the difference of two rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.stats import Gain

ARMS = ("dense", "downsample", "oracle", "dense_ft", "training_free", "training_aware")
"""The base; the base on smaller images; the base after the same extra steps (pruned or not); the base with a pruner;
trained with the pruner in the loop."""

UNIFORMITY = ("uniformity", "uniformity_ci95", "uniformity_thirds", "uniformity_thirds_ci95")

BESIDE = (
    "flips", "flips_ci95", "lost", "gained", "changed", "calibration_error", "calibration_ci95", "overconfidence",
    "hard", "hard_ci95",
)  # fmt: skip
"""Numbers beside the score."""


@dataclass(frozen=True)
class Row:
    """One model of a comparison. Scores are in the unit of the metric: accuracies are shares in [0, 1].

    Attributes:
        arm: one of `ARMS`.
        pruner: name or label of the pruner; None without pruning.
        keep_tokens: nominal budget per image; None without one.
        vision_tokens: tokens of a question after the projector, in the mean over questions with an image.
        retained_tokens: tokens of such a question after the last stage (all of them without pruning).
        uniformity, uniformity_ci95: how evenly the last stage spreads its tokens over the positions of the image, in
            [0, 1], and the half width of its 95 % interval over images; None where everything is kept.
        uniformity_thirds, uniformity_thirds_ci95: the same over 3 x 3 parts of the image.
        seed: seed of the training run, or of a random pruner.
        score: mean of the learnt families; None if there is none.
        ci95: half width of its 95 % interval over images.
        families: the metric in every family, learnt or not.
        learnt: families that the score averages.
        layer: first decoder layer that sees fewer tokens.
        layer_average: vision tokens averaged over the decoder layers.
        gain: (delta, low, high) against the same pruner without training, from paired images; without it, intervals
            are computed as if the two were independent, which is wider.
        control_score: score after the same extra steps without a pruner, then pruned alike.
        control_gain: (delta, low, high) against that control, paired.
        steps: optimizer steps of training.
        seconds: seconds of training.
        num_images: images of the evaluation.
        note: remark for the report.
        flips, flips_ci95: share of questions that are right here and wrong in the dense base or the reverse, and the
            half width of its interval.
        lost, gained, changed: shares of questions that became wrong, became right, and have another answer.
        calibration_error, calibration_ci95: expected calibration error of the answers.
        overconfidence: mean confidence of the answers minus their accuracy.
        hard, hard_ci95: the metric on the hard subset, see `HardSubset`.
    """

    RECORDED: ClassVar[tuple[str, ...]] = ("vision_tokens", "retained_tokens", "layer_average", "note", *UNIFORMITY)
    """Fields that are measured beside the scores."""

    arm: str
    pruner: str | None = None
    keep_tokens: int | float | None = None
    vision_tokens: int | None = None
    retained_tokens: float | None = None
    uniformity: float | None = None
    uniformity_ci95: float | None = None
    uniformity_thirds: float | None = None
    uniformity_thirds_ci95: float | None = None
    seed: int = 0
    score: float | None = None
    ci95: float | None = None
    families: dict[str, float] = field(default_factory=dict)
    learnt: list[str] = field(default_factory=list)
    layer: int = 0
    layer_average: float | None = None
    gain: tuple[float, float, float] | None = None
    control_score: float | None = None
    control_gain: tuple[float, float, float] | None = None
    steps: int | None = None
    seconds: float | None = None
    num_images: int | None = None
    note: str = ""
    flips: float | None = None
    flips_ci95: float | None = None
    lost: float | None = None
    gained: float | None = None
    changed: float | None = None
    calibration_error: float | None = None
    calibration_ci95: float | None = None
    overconfidence: float | None = None
    hard: float | None = None
    hard_ci95: float | None = None

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"A row has no arm '{self.arm}'; choose one of {', '.join(ARMS)}.")
        for name in ("score", "ci95", "control_score", *UNIFORMITY, *BESIDE):
            object.__setattr__(self, name, _known(getattr(self, name)))
        for name in ("gain", "control_gain"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None or any(map(math.isnan, value)) else tuple(value))
        object.__setattr__(self, "families", {k: _known(v) for k, v in self.families.items()})

    @classmethod
    def of(cls, scores: Scores, *, arm: str, **others: Any) -> Row:
        """A row with the fields that follow from the scores; the other fields by name."""
        learnt = list(scores.names if scores.learnt is None else scores.learnt)
        known: dict[str, Any] = {
            "score": scores.score,
            "ci95": scores.ci95,
            "families": scores.families,
            "learnt": learnt,
        }
        return cls(arm, **(known | {"num_images": scores.num_images} | others))

    @property
    def recipe(self) -> tuple[str | None, int | float | None, int]:
        """Pruner, budget and layer: equal in rows that differ in arm or seed alone."""
        return self.pruner, self.keep_tokens, self.layer

    @property
    def key(self) -> tuple[str, str | None, int | float | None, int, int]:
        """Identity of the row within a report."""
        return self.arm, self.pruner, self.keep_tokens, self.layer, self.seed


def difference(row: Row, other: float | None, other_ci95: float | None) -> Gain | None:
    """A row's score minus another, with an interval as if the two were independent."""
    if row.score is None or other is None:
        return None
    half = math.hypot(row.ci95 or 0.0, other_ci95 or 0.0)
    delta = row.score - other
    return Gain(delta, delta - half, delta + half)


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
