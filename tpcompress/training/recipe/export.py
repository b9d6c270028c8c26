"""From a run, or from a plan that needs no training, to an exported folder."""

from __future__ import annotations

from pathlib import Path

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
    base: str, plan: str | Path | PruningPlan, out: str | Path, overwrite: bool = False, measure: Measure | None = None
) -> Path:
    """Export a base with a plan that was never trained.

    Args:
        base: folder, hub id or bundled name.
        plan: any form that `PruningPlan.of` reads: a plan file, a recipe, a short form such as divprune:64@0.
        out: folder to write.
        overwrite: replace an earlier export.
        measure: see `tpcompress.export.export`.

    Raises:
        ValueError: the plan has a pruner that must be trained first.
        FileExistsError: `out` exists.
    """
    chosen = PruningPlan.of(plan)
    untrained = [stage.pruner.name for stage in chosen.stages if stage.pruner.learned]
    if untrained:
        raise ValueError(f"Pruner '{untrained[0]}' has weights to train; run `tpcompress fit` and export with --ckpt.")
    model = attach(load_base(base), chosen).eval()
    facts = {"arm": "training_free", "base": base}
    return export(model, load_processor(base), out, trained_with=facts, measure=measure, overwrite=overwrite)
