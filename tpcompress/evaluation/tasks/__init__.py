"""Tasks: what a model is tested on. One file each, found by being here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from tpcompress.evaluation.create import create_from
from tpcompress.evaluation.scoring.generate import Generation
from tpcompress.evaluation.scoring.metrics import find_metric, name_of
from tpcompress.evaluation.tasks.base import SHARED, Task
from tpcompress.open_set import named_classes

__all__ = ["Task", "create_task", "list_tasks"]


@cache
def list_tasks() -> dict[str, type[Task]]:
    """Every task of this folder by name."""
    return named_classes(__name__, Task, "task")


def create_task(config: Task | str | dict[str, Any]) -> Task:
    """A task from its name, from `{"type": name, **arguments}`, or as it is.

    Every task takes `metric`, `generate` and `label`, see `Task`.

    Raises:
        ValueError: unknown name, unknown or missing argument, or a value that the task refuses.
    """
    shared: dict[str, Any] = {}
    if isinstance(config, Mapping):
        shared = {name: config[name] for name in SHARED if config.get(name) not in (None, False)}
        config = {name: value for name, value in config.items() if name not in SHARED}
    task = create_from(list_tasks(), Task, "task", config)
    if "metric" in shared:
        task.metric = name_of(find_metric(shared["metric"]))
    if "generate" in shared:
        task.generate = Generation.of(shared["generate"])
        if not find_metric(task.metric).reads_text:
            raise ValueError(
                f"Metric {task.metric} reads logits, not generated text; set `metric`, or leave generate out."
            )
    if "label" in shared:
        task.label = str(shared["label"])
    return task
