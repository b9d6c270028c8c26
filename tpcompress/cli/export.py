"""`tpcompress export`: a folder that loads with its pruner, from a run or from a base and a plan."""

from __future__ import annotations

import shlex
from typing import Any

from rich.markup import escape

from tpcompress.cli.console import console


def export(
    out: str,
    ckpt: str | None = None,
    base: str | None = None,
    plan: str | None = None,
    overwrite: bool = False,
    allow_unfinished: bool = False,
    budgets: str | None = None,
    task: dict[str, Any] | str | None = None,
    stock: str | None = None,
    max_shard_size: str = "5GB",
    onnx: str | None = None,
) -> int:
    """Write a folder that loads with its pruner, from a trained run or from a base and a plan without training.

    Example:
        tpcompress export --ckpt runs/tiny_llava/pool_full --out exported --overwrite

    Example:
        tpcompress export exported --base tiny_llava --plan divprune:16@0 --budgets 9,16,36

    Args:
        out: output folder; it must not exist.
        ckpt: checkpoint file, or folder of a run.
        base: base model, instead of ckpt.
        plan: plan of the base: plan file, recipe, or PRUNER:KEEP@LAYER,...
        overwrite: replace an earlier export at `out`.
        allow_unfinished: export a run that stopped before its last step.
        budgets: measure accuracy at these budgets for the model card: 9,16,36 or 0.1,0.25; 32/8,16/4 for two stages.
        task: task for `budgets`, name or mapping; default: the benchmark for tiny_llava, else the validation rows.
        stock: also write the weights, adapters merged, as an unpruned stock checkpoint to this folder.
        max_shard_size: largest weight file, such as 5GB.
        onnx: also write the image side as an ONNX graph to this folder; see tpcompress onnx.
    """
    from tpcompress.export.memory import PeakMemory, weight_bytes
    from tpcompress.export.runtimes import runtime_lines
    from tpcompress.training.recipe.export import export_free, export_run

    if (ckpt is None) == (base is None or plan is None):
        raise ValueError("export needs either --ckpt, or --base and --plan.")
    measure = None
    if budgets is not None:
        from tpcompress.evaluation.budget_curve import BudgetCurve

        measure = BudgetCurve(budgets, console, ckpt, task)
    peak = PeakMemory()
    if ckpt is not None:
        folder = export_run(ckpt, out, overwrite, allow_unfinished, measure, stock, max_shard_size)
    else:
        assert base is not None and plan is not None
        folder = export_free(base, plan, out, overwrite, measure, stock, max_shard_size)
    memory = peak.line(weight_bytes(folder))
    if memory is not None:
        console.print(f"{memory[0].upper()}{memory[1:]}.", highlight=False)
    if stock is not None:
        console.print(f"Unpruned weights in {stock}.", soft_wrap=True)
    following = f" Next: tpcompress verify {shlex.quote(str(folder))}" if (folder / "manifest.json").is_file() else ""
    console.print(f"Exported to {folder}.{following}", soft_wrap=True)
    if onnx is not None:
        from tpcompress.export.onnx import export_onnx

        console.print(escape(str(export_onnx(folder, onnx, overwrite=overwrite))), soft_wrap=True, highlight=False)
    for line in runtime_lines(folder):
        console.print(escape(line), soft_wrap=True, highlight=False)
    return 0
