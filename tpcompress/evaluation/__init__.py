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
    from tpcompress.evaluation.scoring.generate import Generation, evaluate_by_generation
    from tpcompress.evaluation.scoring.metrics import Metric, Reply, list_metrics
    from tpcompress.evaluation.scoring.scores import Scores
    from tpcompress.evaluation.tasks import Task, create_task, list_tasks

MODULES = {
    "BudgetCurve": "budget_curve",
    "Comparison": "compare.config",
    "Generation": "scoring.generate",
    "Inspection": "inspect",
    "Metric": "scoring.metrics",
    "PositionBias": "position_bias",
    "Reply": "scoring.metrics",
    "Scores": "scoring.scores",
    "Task": "tasks",
    "create_task": "tasks",
    "evaluate": "scoring.evaluate",
    "evaluate_by_generation": "scoring.generate",
    "inspect_prefill": "inspect",
    "list_metrics": "scoring.metrics",
    "list_tasks": "tasks",
    "run_comparison": "compare.run",
    "run_find_layer": "find_layer",
    "run_inspection": "inspect",
}
"""Module of every public name, relative to this package."""

__all__ = [
    "BudgetCurve", "Comparison", "Generation", "Inspection", "Metric", "PositionBias", "Reply", "Scores", "Task",
    "create_task", "evaluate", "evaluate_by_generation", "inspect_prefill", "list_metrics", "list_tasks",
    "run_comparison", "run_find_layer", "run_inspection",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
