"""Numbers beside the score of a row: flips against the dense base, calibration, the hard subset."""

from __future__ import annotations

from typing import Any

from tpcompress.evaluation.scoring.agreement import HardSubset, calibration, flips
from tpcompress.evaluation.scoring.scores import Scores


def beside_score(scores: Scores, dense: Scores | None, hard: HardSubset | None, arm: str) -> dict[str, Any]:
    """Fields of a row.

    Args:
        scores: answers of the row.
        dense: answers of the dense base; None for the base itself.
        hard: the hard subset; None leaves it out.
        arm: arm of the row. Smaller images are not scored on the subset, which degraded images chose.
    """
    sure = calibration(scores)
    found: dict[str, Any] = {
        "calibration_error": sure.error, "calibration_ci95": sure.ci95, "overconfidence": sure.gap,
    }  # fmt: skip
    if dense is not None:
        against = flips(scores, dense)
        found |= {"flips": against.rate, "flips_ci95": against.ci95, "lost": against.lost, "gained": against.gained}
        found["changed"] = against.changed
    if hard is not None and hard.size and arm != "downsample":
        part = hard.of(scores)
        found |= {"hard": part.score, "hard_ci95": part.ci95}
    return found
