"""Exports a trained run, or a base with a plan that needs no training."""

from __future__ import annotations

from pathlib import Path

from tpcompress.export import export
from tpcompress.export.bake import Measure
from tpcompress.export.dense import export_dense
from tpcompress.export.weights import MAX_SHARD_SIZE
from tpcompress.insertion.attach import attach
from tpcompress.insertion.plan import PruningPlan
from tpcompress.models import load_base, load_processor
from tpcompress.training.checkpoints.load import load_trained


def export_run(
    checkpoint: str | Path,
    out: str | Path,
    overwrite: bool = False,
    allow_unfinished: bool = False,
    measure: Measure | None = None,
    stock: str | Path | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Export a trained run: LoRA merged, schedule at its end, pruner baked in.

    A run without a plan becomes a stock transformers checkpoint, which any loader and every command takes as a base.
    Adapters of a quantised base are merged into its full-precision weights, which the manifest records.

    Args:
        checkpoint: a .ckpt file, or the run's folder.
        out: output folder.
        overwrite: replace an existing export.
        allow_unfinished: accept a run that was stopped before its last step.
        measure: see `tpcompress.export.export`.
        stock: a second folder, for the trained weights as an unpruned stock checkpoint.
        max_shard_size: largest weight file.

    Raises:
        ValueError: a run that is unfinished, a damaged checkpoint, a model that behaves otherwise than in the training
            process, or `measure` for a run without a plan.
        FileExistsError: `out` exists.
    """
    trained = load_trained(checkpoint, allow_unfinished, unquantised=True)
    if trained.trained_with["arm"] != "training_aware":
        if measure is not None:
            raise ValueError("This run has no pruning plan, so there are no budgets to measure; leave out --budgets.")
        if stock is not None:
            raise ValueError("This run has no pruning plan, so its export is a stock checkpoint; leave out --stock.")
        return export_dense(
            trained.model,
            trained.processor,
            out,
            recipe=trained.recipe,
            trained_with=trained.trained_with,
            overwrite=overwrite,
            trained_probe=trained.probe,
            max_shard_size=max_shard_size,
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
        trained_probe=trained.probe,
        stock=stock,
        max_shard_size=max_shard_size,
    )


def export_free(
    base: str,
    plan: str | Path | PruningPlan,
    out: str | Path,
    overwrite: bool = False,
    measure: Measure | None = None,
    stock: str | Path | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Export a base with a plan that was never trained.

    Args:
        base: folder, hub id or name of a bundled model.
        plan: any form that `PruningPlan.of` reads: a plan file, a recipe, a short form such as divprune:64@0.
        out: output folder.
        overwrite: replace an existing export.
        measure: see `tpcompress.export.export`.
        stock: a second folder, for the base itself as a stock checkpoint.
        max_shard_size: largest weight file.

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
    return export(
        model, load_processor(base), out, trained_with=facts, measure=measure, overwrite=overwrite, stock=stock,
        max_shard_size=max_shard_size,
    )  # fmt: skip
