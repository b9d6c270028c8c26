"""Metrics: how the answer to one question counts. One file each, found by being here."""

from __future__ import annotations

from functools import cache

from tpcompress.evaluation.open_set import classes_in, create_from
from tpcompress.evaluation.scoring.metrics.base import PERCENT, Answers, Metric, Unit

__all__ = ["PERCENT", "Answers", "Metric", "Unit", "find_metric", "list_metrics"]


@cache
def list_metrics() -> dict[str, type[Metric]]:
    """Every metric of this folder by name."""
    return classes_in(__name__, Metric, "metric")


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: there is none.
    """
    return create_from(list_metrics(), Metric, "metric", name)
