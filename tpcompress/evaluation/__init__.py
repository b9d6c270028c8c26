"""Evaluation of pruned models: accuracy with intervals, comparisons, and what is retained of an image.

Public names are imported on first use, because they load the training frameworks and matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcompress.evaluation.budget_curve import BudgetCurve
    from tpcompress.evaluation.compare.config import Comparison
    from tpcompress.evaluation.compare.run import run_comparison
    from tpcompress.evaluation.find_layer import run_find_layer
    from tpcompress.evaluation.inspect import Inspection, inspect_prefill, run_inspection
    from tpcompress.evaluation.position_bias import PositionBias
    from tpcompress.evaluation.scoring.evaluate import evaluate
    from tpcompress.evaluation.scoring.metrics import list_metrics
    from tpcompress.evaluation.scoring.scores import Scores
    from tpcompress.evaluation.tasks import Task, create_task, list_tasks

MODULES = {
    "BudgetCurve": "budget_curve",
    "Comparison": "compare.config",
    "Inspection": "inspect",
    "PositionBias": "position_bias",
    "Scores": "scoring.scores",
    "Task": "tasks",
    "create_task": "tasks",
    "evaluate": "scoring.evaluate",
    "inspect_prefill": "inspect",
    "list_metrics": "scoring.metrics",
    "list_tasks": "tasks",
    "run_comparison": "compare.run",
    "run_find_layer": "find_layer",
    "run_inspection": "inspect",
}
"""Module of every public name, relative to this package."""

__all__ = [
    "BudgetCurve", "Comparison", "Inspection", "PositionBias", "Scores", "Task", "create_task", "evaluate",
    "inspect_prefill", "list_metrics", "list_tasks", "run_comparison", "run_find_layer", "run_inspection",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
