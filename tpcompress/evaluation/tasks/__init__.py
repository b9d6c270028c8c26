"""Tasks: what a model is tested on. One file each, found by being here."""

from __future__ import annotations

from functools import cache
from typing import Any

from tpcompress.evaluation.create import create_from
from tpcompress.evaluation.tasks.base import Task
from tpcompress.open_set import named_classes

__all__ = ["Task", "create_task", "list_tasks"]


@cache
def list_tasks() -> dict[str, type[Task]]:
    """Every task of this folder by name."""
    return named_classes(__name__, Task, "task")


def create_task(config: Task | str | dict[str, Any]) -> Task:
    """A task from its name, from `{"type": name, **arguments}`, or as it is.

    Raises:
        ValueError: unknown name, unknown or missing argument, or a value that the task refuses.
    """
    return create_from(list_tasks(), Task, "task", config)
