"""From a run, or from a plan that needs no training, to an exported folder."""

from __future__ import annotations

from pathlib import Path

from tpcompress.errors import read_yaml
from tpcompress.export import export
from tpcompress.export.bake import Measure
from tpcompress.insertion.attach import attach
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.module import load_base, load_processor


def export_run(
    checkpoint: str | Path,
    out: str | Path,
    overwrite: bool = False,
    allow_unfinished: bool = False,
    measure: Measure | None = None,
) -> Path:
    """Export a trained run: LoRA merged, schedule at its end, pruner baked in.

    Adapters of a quantised base are merged into the base's own weights, which the manifest says.

    Args:
        checkpoint: a .ckpt file, or the run's folder.
        out: folder to write.
        overwrite: replace an earlier export.
        allow_unfinished: accept a run that was stopped before its last step.
        measure: see `tpcompress.export.export`.

    Raises:
        ValueError: the run is unfinished, dense, or its checkpoint damaged.
        FileExistsError: `out` exists.
    """
    trained = load_trained(checkpoint, allow_unfinished, whole=True)
    if trained.trained_with["arm"] != "training_aware":
        raise ValueError(
            "This run has no pruning plan, there is nothing to bake in; use save_pretrained for a dense model."
        )
    return export(
        trained.model,
        trained.processor,
        out,
        recipe=trained.recipe,
        trained_with=trained.trained_with,
        trained_budgets=trained.trained_budgets,
        measure=measure,
        overwrite=overwrite,
    )


def export_free(
    base: str, plan: str | Path, out: str | Path, overwrite: bool = False, measure: Measure | None = None
) -> Path:
    """Export a base with a plan that was never trained.

    Args:
        base: folder, hub id or bundled name.
        plan: a plan file, or a recipe whose `model.plan` is taken.
        out: folder to write.
        overwrite: replace an earlier export.
        measure: see `tpcompress.export.export`.

    Raises:
        ValueError: the plan has a pruner that must be trained first.
        FileExistsError: `out` exists.
    """
    chosen = plan_in(plan)
    untrained = [stage.pruner.name for stage in chosen.stages if stage.pruner.learned]
    if untrained:
        raise ValueError(f"Pruner '{untrained[0]}' has weights to train; run `tpcompress fit` and export with --ckpt.")
    model = attach(load_base(base), chosen).eval()
    facts = {"arm": "training_free", "base": base}
    return export(model, load_processor(base), out, trained_with=facts, measure=measure, overwrite=overwrite)


def plan_in(path: str | Path) -> PruningPlan:
    """The plan of a plan file or of a recipe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, or a recipe without a plan.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No plan at {path}; give a plan file or a recipe.")
    values = read_yaml(path)
    if isinstance(values, dict) and "model" in values:
        values = (values["model"] or {}).get("plan")
        if values is None:
            raise ValueError(f"The recipe {path} has no model.plan: it trains the dense model.")
    return PruningPlan.from_dict(values)
