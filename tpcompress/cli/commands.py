"""The commands, one function each: its signature and docstring are the options and the help of the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

console = Console()


def fit(args: list[str]) -> int:
    """Train from a recipe: `tpcompress fit --config recipes/tiny_llava/pool_full.yaml [--ckpt_path last]`."""
    from tpcompress.training.recipe.run import run_recipe

    run = run_recipe(args)
    if args[0] == "fit" and run.trainer.is_global_zero:
        folder = run.trainer.default_root_dir
        following = f" Next: tpcompress export --ckpt {folder} --out {folder}/export" if run.model.plan else ""
        console.print(f"Trained: {folder}.{following}", soft_wrap=True)
    return 0


def export(
    out: str,
    ckpt: str | None = None,
    base: str | None = None,
    plan: str | None = None,
    overwrite: bool = False,
    allow_unfinished: bool = False,
    budgets: str | None = None,
) -> int:
    """Write a folder that loads with its pruner: from a trained run, or from a base and a plan that need no training.

    Args:
        out: folder to write; it must not exist.
        ckpt: checkpoint, or the folder of a run.
        base: instead of ckpt, a base model ...
        plan: ... and a plan or recipe file.
        overwrite: replace an earlier export at `out`.
        allow_unfinished: export a run that stopped before its last step.
        budgets: measure accuracy at these, for the card: 9,16,36 or 0.1,0.25; 32/8,16/4 for a plan of two stages.
    """
    from tpcompress.training.recipe.export import export_free, export_run

    if (ckpt is None) == (base is None or plan is None):
        raise ValueError("export needs either --ckpt, or --base and --plan.")
    measure = None
    if budgets is not None:
        from tpcompress.evaluation.budget_curve import BudgetCurve

        measure = BudgetCurve(budgets, console, ckpt)
    if ckpt is not None:
        folder = export_run(ckpt, out, overwrite, allow_unfinished, measure)
    else:
        assert base is not None
        assert plan is not None
        folder = export_free(base, plan, out, overwrite, measure)
    console.print(f"Exported to {folder}. Next: tpcompress verify {folder}")
    return 0


def cache_teacher(config: str, out: str, top: int = 64) -> int:
    """Let the unpruned base answer a recipe's training data once, for teacher Cached; goes on where it was interrupted.

    Args:
        config: a recipe.
        out: folder of the cache.
        top: most likely tokens kept per answer position.
    """
    from tpcompress.cli.cache_teacher import cache_of_recipe

    written = cache_of_recipe(config, out, top, console)
    console.print(
        f"{written} sequences written to {out}. Next: model.teacher: Cached with folder: {out}.", soft_wrap=True
    )
    return 0


def verify(folder: str) -> int:
    """Replay the stored probe of an exported folder in a fresh process; exit code 1 if it differs.

    Args:
        folder: an exported folder.
    """
    from tpcompress.export import verify_in_fresh_process

    report = verify_in_fresh_process(folder)
    console.print(escape(str(report)))
    return 0 if report.ok else 1


def compare(config: str, out: str | None = None) -> int:
    """Compare dense, training-free and training-aware pruning; prints a table and writes report and figures.

    Args:
        config: a comparison file, e.g. recipes/tiny_llava/compare.yaml.
        out: folder of the results; default: the file's own.
    """
    from tpcompress.evaluation.compare.run import run_comparison

    run_comparison(config, out, console)
    return 0


def study(config: str, out: str | None = None, tables: bool = False, into: str | None = None) -> int:
    """Pruners x budgets x ways to train x seeds, in cells that survive interruption and that processes may share.

    Args:
        config: a study file, e.g. recipes/studies/training_aware.yaml.
        out: folder of the results; default: the file's own.
        tables: only make the tables of what is there.
        into: a document whose tables, between its two markers, are made anew.
    """
    from tpcompress.lab.study.run import run_study

    run_study(config, out, console, tables, into)
    return 0


def quickstart(out: str = "runs/quickstart") -> int:
    """The main job on the bundled base: compare, train, export, verify, answer a question. Less than ten minutes.

    Args:
        out: folder of the results.
    """
    from tpcompress.cli.quickstart import run_quickstart

    return run_quickstart(Path(out), console)


def inspect_model(
    model: str,
    image: str,
    prompt: str,
    plan: str | None = None,
    out: str = "inspect.png",
    dtype: str = "float32",
    device: str = "cpu",
) -> int:
    """What every stage of a plan does to one prompt: tokens, sequence, cache, and a picture of what is left.

    Args:
        model: folder of a model, a hub id, tiny_llava, or an exported folder.
        image: an image file.
        prompt: a question; `<image>` in it says where the image belongs.
        plan: plan file, recipe, or PRUNER:TOKENS@LAYER (divprune:64@0,dart:0.1@8); default: that of an exported folder.
        out: the PNG to write.
        dtype: of the weights: float32, bfloat16, float16 or auto.
        device: cpu, cuda ...
    """
    from tpcompress.evaluation.inspect import run_inspection

    run_inspection(model, image, prompt, plan, out, dtype, device, console)
    console.print(f"Retained tokens: {out}", soft_wrap=True, highlight=False)
    return 0


def find_layer(
    model: str,
    data: str | None = None,
    image_folder: str | None = None,
    num_samples: int = 32,
    threshold: float = 0.01,
    layers: list[int] | None = None,
    out: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
) -> int:
    """From which layer on a model can do without its vision tokens (VTW): KL to the whole model, layer by layer.

    Args:
        model: folder of a model, a hub id, or tiny_llava.
        data: chat data to calibrate on, as recipes take it; default: the built-in benchmark.
        image_folder: where its pictures are.
        num_samples: pictures, with one question each.
        threshold: nats below which every later layer must stay.
        layers: layers to try; default: all at which a stage may act.
        out: plan file to write with the layer that was found.
        seed: of the choice of samples and of the interval.
        dtype: of the weights: float32, bfloat16, float16 or auto.
        device: cpu, cuda ...
    """
    from tpcompress.evaluation.find_layer import run_find_layer

    run_find_layer(model, data, image_folder, num_samples, threshold, layers, out, seed, dtype, device, console)
    return 0


def estimators(config: str, out: str | None = None, marks: str | None = None) -> int:
    """Which ways to train a scorer teach it: on a task of 24 tokens, and on a frozen base beside untrained rules.

    Args:
        config: a file of estimators, e.g. recipes/tiny_llava/estimators.yaml.
        out: folder of the results; default: the file's own.
        marks: file to write what was found of each estimator to, for the warning of `fit`.
    """
    from tpcompress.lab.estimators.run import run_estimators

    run_estimators(config, out, marks, console)
    return 0


def pruners(name: str | None = None) -> int:
    """The table of pruners and the parts of learned ones, or the documentation and arguments of one of them.

    Args:
        name: a pruner, scorer, selector or applier, or the dotted path of a pruner elsewhere.
    """
    from tpcompress.cli.lists import one_pruner, pruner_table

    pruner_table(console) if name is None else one_pruner(name, console)
    return 0


def families(name: str | None = None) -> int:
    """The table of model families, what is known not to work, and what is refused; or one family in full.

    Args:
        name: one family, or a model type.
    """
    from tpcompress.cli.lists import family_table, one_family

    family_table(console) if name is None else one_family(name, console)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "fit": fit, "validate": fit, "export": export, "verify": verify, "compare": compare, "study": study,
    "quickstart": quickstart, "inspect": inspect_model, "find-layer": find_layer, "pruners": pruners,
    "families": families, "estimators": estimators, "cache-teacher": cache_teacher,
}  # fmt: skip
"""By the word on the shell."""
