"""Tasks: what a model is tested on. One file each, found by being here."""

from __future__ import annotations

from functools import cache
from typing import Any

from tpcompress.evaluation.open_set import classes_in, create_from
from tpcompress.evaluation.tasks.base import Task

__all__ = ["Task", "create_task", "list_tasks"]


@cache
def list_tasks() -> dict[str, type[Task]]:
    """Every task of this folder by name."""
    return classes_in(__name__, Task, "task")


def create_task(config: Task | str | dict[str, Any]) -> Task:
    """A task from its name, from `{"type": name, **arguments}`, or as it is.

    Raises:
        ValueError: unknown name, unknown or missing argument, or a value that the task refuses.
    """
    return create_from(list_tasks(), Task, "task", config)
