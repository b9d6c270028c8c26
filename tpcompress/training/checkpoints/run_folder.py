"""Reads the folder of a run: its recipe, its budgets at the end, and its last diagnostics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonargparse

from tpcompress.errors import read_yaml
from tpcompress.export.budgets import Range
from tpcompress.insertion.plan import Budget
from tpcompress.training.module import PruningModule
from tpcompress.training.phases import PrunerPhase, is_learned
from tpcompress.training.renamed import rename
from tpcompress.training.schedules import Constant, Schedule

DIAGNOSTICS = "diagnostics.json"
DRAWS = (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)
"""Random numbers at which the range of a drawn budget is evaluated: both ends of [0, 1), and some between."""


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe of a run, with old names translated; None if there is no file.

    Raises:
        ValueError: the file is not a recipe.
    """
    if not path.is_file():
        return None
    values = read_yaml(path)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError(f"{path} is not a recipe: it has no `model`; remove it, or restore the file of the run.")
    recipe: dict[str, Any] = rename(values)[0]
    return recipe


def instantiate(kind: type, values: Any) -> Any:
    """An object of a recipe from its `class_path` and `init_args`; None for null.

    Args:
        kind: base class.
        values: value in the recipe.

    Raises:
        ValueError: unknown class, or invalid arguments.
    """
    if values is None:
        return None
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.instantiate(parser.parse_object({"value": values})).value
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"The recipe's {kind.__name__} is invalid: {' '.join(str(error).split())}") from error


def final_ranges(module: PruningModule, recipe: dict[str, Any], steps: int) -> list[Range] | None:
    """Lowest and highest budget of each stage at the last step of a run; None without a plan.

    A ramp ends at the plan's budget; a schedule that draws budgets, or uses several per step, ends with a range.

    Args:
        module: module of the run, with its model loaded.
        recipe: recipe of the run.
        steps: optimizer steps of the run.
    """
    if module.plan is None:
        return None
    schedule = _last_schedule(module, recipe["model"], steps)
    return [_range(schedule, stage.budget) for stage in module.plan.stages]


def manifest_entry(folder: Path, recipe: dict[str, Any] | None) -> dict[str, Any]:
    """Schedule, losses, teacher and diagnostics of a run, for the manifest of an export.

    Args:
        folder: folder of the run.
        recipe: recipe of the run; None without one.

    Raises:
        ValueError: damaged diagnostics.
    """
    found: dict[str, Any] = {}
    if recipe is not None:
        model = recipe["model"]
        found = {name: _plain(model.get(name)) for name in ("schedule", "losses", "teacher", "full_every")}
        found["losses"] = found["losses"] or [{"class": "Label"}]
        found["schedule"] = found["schedule"] or {"class": "Constant"}
        found["seed"] = recipe.get("seed_everything")
    path = folder / DIAGNOSTICS
    if path.is_file():
        try:
            diagnostics = json.loads(path.read_text(encoding="utf-8"))
            found["diagnostics"] = {"last": diagnostics["looks"][-1], "alarms": diagnostics["alarms"]}
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it to export without.") from error
    return found


def _last_schedule(module: PruningModule, model: dict[str, Any], steps: int) -> Schedule:
    """The schedule of the last phase."""
    alone, first = model.get("pruner_phase") or {}, 0
    if is_learned(module.plan):
        rest = len(module.trainable) > len(module.pruner_parameters())
        first = PrunerPhase(steps=alone.get("steps")).count(module.plan, steps, module.train_parts, rest)
    chosen = alone.get("schedule") if first == steps else model.get("schedule")
    return instantiate(Schedule, chosen) or Constant()


def _range(schedule: Schedule, final: Budget) -> Range:
    budgets = [budget for draw in DRAWS for budget in schedule.budgets(final, 1.0, draw)]
    size = [budget.keep_tokens if budget.keep_tokens is not None else budget.keep_ratio for budget in budgets]
    order = sorted(range(len(budgets)), key=lambda number: size[number])  # type: ignore[arg-type,return-value]
    return budgets[order[0]], budgets[order[-1]]


def _plain(value: Any) -> Any:
    """Objects of a recipe as {"class": name, **arguments}, without arguments that are null."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = {k: _plain(v) for k, v in (value.get("init_args") or {}).items() if v is not None}
        return {"class": value["class_path"].rpartition(".")[2], **arguments}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
