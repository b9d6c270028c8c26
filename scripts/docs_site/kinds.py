"""The open sets of the package: for each kind, where its files are, what is registered, and which guide adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpcompress.evaluation.scoring.metrics import list_metrics
from tpcompress.evaluation.tasks import list_tasks
from tpcompress.families import list_families
from tpcompress.pruners import list_pruners
from tpcompress.pruners.registry import list_parts
from tpcompress.training.losses import list_losses
from tpcompress.training.schedules import list_schedules
from tpcompress.training.teachers import list_teachers


@dataclass(frozen=True)
class Kind:
    """One open set.

    Attributes:
        one: name of one of its members, as the guide `adding/<one>.md` has it.
        many: name of the set, its folder under `reference/`, and the title of its index.
        folder: where its files are, relative to the repository root.
        about: one sentence for the index page.
        members: registered objects by name: classes, or families.
    """

    one: str
    many: str
    folder: str
    about: str
    members: Callable[[], Mapping[str, Any]]


KINDS = (
    Kind("pruner", "pruners", "tpcompress/pruners", "A pruner chooses which vision tokens are retained.", list_pruners),
    Kind(
        "scorer", "scorers", "tpcompress/pruners/scorers",
        "A scorer gives every vision token of a learned gate its score.", lambda: list_parts("scorer"),
    ),
    Kind(
        "selector", "selectors", "tpcompress/pruners/selectors",
        "A selector chooses tokens by score, and in training returns gates that carry a gradient.",
        lambda: list_parts("selector"),
    ),
    Kind(
        "applier", "appliers", "tpcompress/pruners/appliers",
        "An applier defines how gates act on the model while the scorer trains.", lambda: list_parts("applier"),
    ),
    Kind(
        "family", "families", "tpcompress/families",
        "A family describes where the vision tokens of a group of model types are, and how they lie.", list_families,
    ),
    Kind(
        "loss", "losses", "tpcompress/training/losses",
        "A loss is a weighted term of the objective (recipe key `model.losses`).", list_losses,
    ),
    Kind(
        "teacher", "teachers", "tpcompress/training/teachers",
        "A teacher provides the targets of distillation losses (recipe key `model.teacher`).", list_teachers,
    ),
    Kind(
        "schedule", "schedules", "tpcompress/training/schedules",
        "A schedule sets the token budget of each training step (recipe key `model.schedule`).", list_schedules,
    ),
    Kind(
        "task", "tasks", "tpcompress/evaluation/tasks",
        "A task defines what a model is tested on (key `task` of a comparison file).", list_tasks,
    ),
    Kind(
        "metric", "metrics", "tpcompress/evaluation/scoring/metrics",
        "A metric defines how the answer to a question counts (key `metric` of a comparison file).", list_metrics,
    ),
)  # fmt: skip


def kind(one: str) -> Kind:
    """The kind of that name."""
    (found,) = [each for each in KINDS if each.one == one]
    return found
