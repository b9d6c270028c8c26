"""Metrics: how the answer to one question counts. One file each, found by being here, or any class by dotted path."""

from __future__ import annotations

from functools import cache

from tpcompress.evaluation.create import create_from
from tpcompress.evaluation.scoring.metrics.base import PERCENT, Answers, Metric, Reply, Unit
from tpcompress.open_set import class_at, named_classes

__all__ = ["PERCENT", "Answers", "Metric", "Reply", "Unit", "find_metric", "list_metrics", "name_of"]

UNAVAILABLE = {
    "cider": "torchmetrics has no CIDEr and pycocoevalcap needs Java",
    "spice": "torchmetrics has no SPICE and pycocoevalcap needs Java",
    "meteor": "torchmetrics has no METEOR",
}
"""Metrics that no library here computes, and why."""


@cache
def list_metrics() -> dict[str, type[Metric]]:
    """Every metric of this folder by name."""
    return named_classes(__name__, Metric, "metric")


def find_metric(name: str) -> Metric:
    """The metric of that name, or of a dotted path: `package.module:Class` or `package.module.Class`.

    Raises:
        ValueError: there is none, or the path does not lead to a `Metric`.
    """
    if isinstance(name, str) and name not in list_metrics():
        if name.lower() in UNAVAILABLE:
            reason = UNAVAILABLE[name.lower()]
            raise ValueError(
                f"No metric '{name}': {reason}; name a class of your own by its dotted path, or use rouge_l."
            )
        if ":" in name or "." in name:
            return class_at(name, Metric, "metric", "tpcompress.evaluation.Metric")()
    return create_from(list_metrics(), Metric, "metric", name)


def name_of(metric: Metric) -> str:
    """The name by which `find_metric` finds a metric again."""
    cls = type(metric)
    return (
        metric.name if list_metrics().get(getattr(cls, "name", "")) is cls else f"{cls.__module__}:{cls.__qualname__}"
    )
