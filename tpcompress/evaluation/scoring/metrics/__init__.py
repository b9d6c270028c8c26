"""Metrics: how the answer to one question counts. One file each, found by being here."""

from __future__ import annotations

from functools import cache

from tpcompress.evaluation.create import create_from
from tpcompress.evaluation.scoring.metrics.base import PERCENT, Answers, Metric, Unit
from tpcompress.open_set import named_classes

__all__ = ["PERCENT", "Answers", "Metric", "Unit", "find_metric", "list_metrics"]


@cache
def list_metrics() -> dict[str, type[Metric]]:
    """Every metric of this folder by name."""
    return named_classes(__name__, Metric, "metric")


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: there is none.
    """
    return create_from(list_metrics(), Metric, "metric", name)
