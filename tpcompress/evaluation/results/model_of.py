"""The row that a result file belongs to, from the arguments that its model was loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tpcompress.evaluation.engine.plans import key_of
from tpcompress.evaluation.results.base import Model
from tpcompress.export.folder import FORMAT, MANIFEST, read_json
from tpcompress.insertion.budget import read_budgets
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.plan_source import read_keep


def model_of(arguments: Mapping[str, str], title: str) -> Model:
    """The model of a run of tpcompress, or of another model without a plan.

    Args:
        arguments: `pretrained`, `plan`, `keep_tokens`, `keep_ratio` and `dense` are read.
        title: name of the model in the harness.
    """
    name = arguments.get("pretrained", "")
    title = f"{title} {name}".strip()
    if plan := arguments.get("plan"):
        return _of_plan(PruningPlan.of(plan.replace("+", ",") if not Path(plan).is_file() else plan), False, title)
    manifest = Path(name) / MANIFEST
    values = read_json(manifest) if name and manifest.is_file() else {}
    if values.get("format") != FORMAT:
        # A folder that is gone, or a hub id, may be an export.
        known = name and (Path(name).is_dir() or title.partition(" ")[0] != "tpcompress" or "/" not in name)
        return Model("dense" if known else None, title=title)
    if arguments.get("dense", "").lower() == "true":
        return Model("dense_ft" if values.get("trained_budgets") else "dense", title=title)
    given = PruningPlan.from_dict(values["plan"], allow_outside=False)
    for key in ("keep_tokens", "keep_ratio"):
        if key in arguments:
            kept = [read_keep(part)[key] for part in arguments[key].split("+")]
            budgets = read_budgets(None, **{key: kept})
            given = given if budgets is None else given.with_budgets(budgets)
    return _of_plan(given, bool(values.get("trained_budgets")), title)


def _of_plan(plan: PruningPlan, trained: bool, title: str) -> Model:
    pruner, layer, keep = key_of(plan)
    name = "+".join(f"{stage.pruner.name}@{stage.layer}" for stage in plan.stages) if len(plan.stages) > 1 else pruner
    return Model("training_aware" if trained else "training_free", name, keep, layer, title)
