"""What a run's folder tells of its training: recipe, budgets at the end, and what the last look at the pruner found."""

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
"""Random numbers that show where a drawn budget may lie: the ends of [0, 1), and some between."""


def read_recipe(path: Path) -> dict[str, Any] | None:
    """A run's recipe, in today's names; None where there is none.

    Raises:
        ValueError: it is no recipe.
    """
    if not path.is_file():
        return None
    values = read_yaml(path)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError(f"{path} is no recipe: it has no `model`; remove it, or put the run's own back.")
    recipe: dict[str, Any] = rename(values)[0]
    return recipe


def made(kind: type, values: Any) -> Any:
    """An object of a recipe: a class of `kind`, or one below it, by `class_path` and `init_args`; None of null.

    Raises:
        ValueError: no such class, or arguments that it refuses.
    """
    if values is None:
        return None
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    try:
        return parser.instantiate(parser.parse_object({"it": values})).it
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"The recipe's {kind.__name__} cannot be made: {' '.join(str(error).split())}") from error


def final_ranges(module: PruningModule, recipe: dict[str, Any], steps: int) -> list[Range] | None:
    """Lowest and highest budget of each stage that the last step of a run may have had.

    A ramp ends at the plan's budget; a schedule that draws, or takes several in a step, ends with a range.

    Args:
        module: of the run, its model standing.
        recipe: of the run.
        steps: optimizer steps of the run.
    """
    if module.plan is None:
        return None
    schedule = _last_schedule(module, recipe["model"], steps)
    return [_range(schedule, stage.budget) for stage in module.plan.stages]


def facts_of(folder: Path, recipe: dict[str, Any] | None) -> dict[str, Any]:
    """What a manifest says of a run beside its settings.

    Args:
        folder: of the run.
        recipe: of the run.
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
            seen = json.loads(path.read_text(encoding="utf-8"))
            found["diagnostics"] = {"last": seen["looks"][-1], "alarms": seen["alarms"]}
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it to go on without.") from error
    return found


def _last_schedule(module: PruningModule, model: dict[str, Any], steps: int) -> Schedule:
    """The schedule of the run's last phase."""
    alone, first = model.get("pruner_phase") or {}, 0
    if is_learned(module.plan):
        rest = len(module.trainable) > len(module.pruner_parameters())
        first = PrunerPhase(steps=alone.get("steps")).count(module.plan, steps, module.train_parts, rest)
    chosen = alone.get("schedule") if first == steps else model.get("schedule")
    return made(Schedule, chosen) or Constant()


def _range(schedule: Schedule, final: Budget) -> Range:
    asked = [budget for draw in DRAWS for budget in schedule.budgets(final, 1.0, draw)]
    size = [budget.keep_tokens if budget.keep_tokens is not None else budget.keep_ratio for budget in asked]
    order = sorted(range(len(asked)), key=lambda number: size[number])  # type: ignore[arg-type,return-value]
    return asked[order[0]], asked[order[-1]]


def _plain(value: Any) -> Any:
    """Objects of a recipe as {"class": name, **arguments that are not null}."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = {k: _plain(v) for k, v in (value.get("init_args") or {}).items() if v is not None}
        return {"class": value["class_path"].rpartition(".")[2], **arguments}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
