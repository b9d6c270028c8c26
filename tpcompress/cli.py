"""The `tpcompress` command: fit, validate, export, verify, compare, study, quickstart, inspect and the lists."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

TRACEBACK = "--traceback"
NOISE = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*",
    ".*_pytree.*",
    ".*across ranks is zero.*",
)
console = Console()


def main(args: list[str] | None = None) -> int:
    """Run one command; errors that a user can mend become one line and exit code 2 (`--traceback` shows all)."""
    args = list(sys.argv[1:] if args is None else args)
    show_traceback = TRACEBACK in args
    args = [a for a in args if a != TRACEBACK]
    commands = _commands()
    if not args or args[0] in ("-h", "--help", "help"):
        _usage(commands)
        return 0
    name, rest = args[0], args[1:]
    if name not in commands:
        import difflib

        near = difflib.get_close_matches(name, commands, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return _fail(f"No command '{name}'. Commands: {', '.join(commands)}.{hint}")
    _quieten(name)
    try:
        if name in ("fit", "validate"):
            return commands[name](args)
        return _call(name, commands[name], rest)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "Interrupted.", 130)
    except Exception as error:
        if show_traceback:
            raise
        return _fail(_one_line(error))


def fit(args: list[str]) -> int:
    """Train from a recipe: `tpcompress fit --config recipes/tiny_llava/pool_full.yaml [--ckpt_path last]`."""
    from tpcompress.training.run import run_recipe

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
    from tpcompress.training.produce import export_free, export_run

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
    from tpcompress.training.cache_run import cache_of_recipe

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
    from tpcompress.evaluation.compare import run_comparison

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
    from tpcompress.evaluation.study import run_study

    run_study(config, out, console, tables, into)
    return 0


def quickstart(out: str = "runs/quickstart") -> int:
    """The main job on the bundled base: compare, train, export, verify, answer a question. About five minutes.

    Args:
        out: folder of the results.
    """
    from tpcompress.evaluation.quickstart import run_quickstart

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
    from tpcompress.evaluation.estimators_run import run_estimators

    run_estimators(config, out, marks, console)
    return 0


def pruners(name: str | None = None) -> int:
    """The table of pruners and the parts of learned ones, or the documentation and arguments of one of them.

    Args:
        name: a pruner, scorer, selector or applier, or the dotted path of a pruner elsewhere.
    """
    from tpcompress.evaluation.listing import one_pruner, pruner_table

    pruner_table(console) if name is None else one_pruner(name, console)
    return 0


def families(name: str | None = None) -> int:
    """The table of model families, what is known not to work, and what is refused; or one family in full.

    Args:
        name: one family, or a model type.
    """
    from tpcompress.evaluation.listing import family_table, one_family

    family_table(console) if name is None else one_family(name, console)
    return 0


# ---------------------------------------------------------------------- plumbing


def _commands() -> dict[str, Callable[..., int]]:
    return {
        "fit": fit, "validate": fit, "export": export, "verify": verify, "compare": compare, "study": study,
        "quickstart": quickstart, "inspect": inspect_model, "find-layer": find_layer, "pruners": pruners,
        "families": families, "estimators": estimators, "cache-teacher": cache_teacher,
    }  # fmt: skip


def _call(name: str, command: Callable[..., int], args: list[str]) -> int:
    """Parse a command's arguments from its signature and docstring; its first required one may stand alone."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=f"tpcompress {name}", exit_on_error=False, description=_summary(command))
    parser.add_function_arguments(command, as_positional=False)
    first = next(iter(inspect.signature(command).parameters), None)
    if first and args and not args[0].startswith("-"):
        args = [f"--{first}", *args]
    try:
        values: Any = parser.parse_args(args)
    except ArgumentError as error:
        raise ValueError(f"{error} See tpcompress {name} --help.") from error
    return command(**values.as_dict())


def _usage(commands: dict[str, Callable[..., int]]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in commands.items():
        text = "Validate with a recipe, trained or not." if name == "validate" else _summary(command)
        table.add_row(f"  [bold]{name}[/bold]", escape(text))
    console.print(escape("usage: tpcompress COMMAND [options] [--traceback]\n"))
    console.print(table)
    console.print("\ntpcompress COMMAND --help shows the options of a command.")


def _summary(command: Callable[..., int]) -> str:
    return (inspect.getdoc(command) or "").partition("\n")[0]


def _one_line(error: Exception) -> str:
    """The message of an error; what nobody foresaw says so."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | ArithmeticError | NotImplementedError | TypeError):
        return message or type(error).__name__
    return f"{message or 'no message'} ({type(error).__name__}; --traceback shows where)"


def _fail(message: str, code: int = 2) -> int:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}")
    return code


def _quieten(name: str) -> None:
    """Third parties' progress bars and advice off; their warnings about a run stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt to reach the hub
    if name in ("fit", "validate", "compare", "study", "quickstart", "estimators", "cache-teacher"):
        import datasets
        import lightning  # noqa: F401  it sets the levels of its loggers when it is imported

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        for logger in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(logger).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
