"""The `tpcompress` command: dispatches to commands, parses options, prints help, and reports errors in one line."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from tpcompress.cli.commands import COMMANDS, GROUPS, RECIPE_COMMANDS
from tpcompress.cli.console import console
from tpcompress.cli.fit_short import fit_model, is_short, split_options
from tpcompress.cli.help import show_command, show_recipe_command, show_usage
from tpcompress.cli.mistyped import check_options, check_recipe
from tpcompress.cli.options import HELP, normalized, underscored
from tpcompress.errors import did_you_mean, missing_extra
from tpcompress.version import __version__

TRACEBACK = "--traceback"
NOISE = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*",
    ".*_pytree.*",
    ".*across ranks is zero.*",
    ".*is_gradient_checkpointing.*",
    ".*Palette images with Transparency.*",
)
"""Warnings of other packages that say nothing about a run."""

TRAINING = (
    *RECIPE_COMMANDS,
    "compress",
    "evaluate",
    "compare",
    "rank",
    "study",
    "quickstart",
    "estimators",
    "cache-teacher",
)
"""Commands that import the training frameworks."""

LISTS = ("list", "pruners", "families")
"""Commands that load no model."""


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: arguments after `tpcompress`; default: those of the process.

    Returns:
        Exit code: 2 for an error, which is reported in one line (`--traceback` raises it), 130 after an interrupt.
    """
    args = list(sys.argv[1:] if args is None else args)
    show_traceback = TRACEBACK in args
    args = [a for a in args if a != TRACEBACK]
    if not args or args[0] in (*HELP, "help"):
        show_usage(GROUPS, console)
        return 0
    if args[0] in ("--version", "-V", "version"):
        console.print(f"tpcompress {__version__}", highlight=False)
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = did_you_mean(name.strip("-").replace("_", "-"), COMMANDS)
        return _fail(f"No command '{name}'. Commands: {', '.join(COMMANDS)}.{near}")
    try:
        if name in RECIPE_COMMANDS:
            return _run_recipe(name, rest)
        check_options(normalized(COMMANDS[name], name, rest))
        values = parse(name, rest)
        _quieten(name)
        return COMMANDS[name](**values)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "Interrupted.", 130)
    except Exception as error:
        if show_traceback:
            raise
        hint = missing_extra(error) if isinstance(error, ImportError) else None
        return _fail(hint or _one_line(error))


def parse(name: str, args: list[str]) -> dict[str, Any]:
    """Parse the options of a command, from the signature and docstring of its function.

    Args:
        name: name of the command; not one that runs a recipe.
        args: arguments after the name.

    Raises:
        ValueError: an unknown option, a missing or impossible value.
        SystemExit: after printing help.
    """
    return parse_for(COMMANDS[name], name, args)


def parse_for(command: Callable[..., object], name: str, args: list[str]) -> dict[str, Any]:
    """Parse the options of a function that stands for a command; see `parse`."""
    given = normalized(command, name, args)
    if given[-1:] == ["--help"]:
        show_command(name, command, console)
        raise SystemExit(0)
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=f"tpcompress {name}", exit_on_error=False)
    parser.add_function_arguments(command, as_positional=False)
    try:
        values: Any = parser.parse_args(given)
    except ArgumentError as error:
        raise ValueError(f"{' '.join(str(error).split()).rstrip('.')}; see tpcompress {name} --help.") from error
    return values.as_dict()


def _run_recipe(name: str, args: list[str]) -> int:
    """Run `fit` or `validate`, whose options are parsed by the recipe."""
    command = COMMANDS[name]
    if args and args[-1] in HELP:
        show_recipe_command(name, command, console, fit_model if name == "fit" else None)
        raise SystemExit(0)
    if args[-2:] in ([word, "all"] for word in HELP):  # every option of the recipe, which the parser prints
        args = args[:-1]
    if args and args[0].endswith((".yaml", ".yml")):
        raise ValueError(f"A recipe is given by its option: tpcompress {name} --config {args[0]}.")
    own, args = split_options(fit_model, args) if name == "fit" and is_short(args) else ([], args)
    check_options(normalized(fit_model, name, own)) if own else check_recipe(args)
    _quieten(name)
    if own:
        args = [*fit_model(**parse_for(fit_model, name, own)), *args]
    return command([name, *map(underscored, args)])


def _one_line(error: Exception) -> str:
    """The message of an error; an error of an unexpected type also names its type."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | ArithmeticError | NotImplementedError | TypeError):
        return message or type(error).__name__
    return f"{message or 'no message'} ({type(error).__name__}; --traceback shows where)"


def _fail(message: str, code: int = 2) -> int:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}")
    return code


def _quieten(name: str) -> None:
    """Turn off progress bars and advice of other packages; their warnings about a run remain."""
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    if name in LISTS:
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt to reach the hub
    if name in TRAINING:
        # Lightning first: it sets the levels of its loggers, and typing caches the order of its unions of types, which
        # decides whether jsonargparse reads `limit_train_batches: 1` as one batch or as all of them.
        importlib.import_module("lightning")
        datasets = importlib.import_module("datasets")

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        for logger in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(logger).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
