"""The `tpcompress` command: dispatches to commands, parses options, prints help, and reports errors in one line."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpcompress.cli.commands import COMMANDS, GROUPS, RECIPE_COMMANDS
from tpcompress.cli.console import console
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
)
"""Warnings of other packages that say nothing about a run."""

TRAINING = (*RECIPE_COMMANDS, "compare", "study", "quickstart", "estimators", "cache-teacher")
"""Commands that import the training frameworks."""


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
        _print_usage()
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
    from jsonargparse import ArgumentError, ArgumentParser

    command = COMMANDS[name]
    given = normalized(command, name, args)
    parser = ArgumentParser(prog=f"tpcompress {name}", exit_on_error=False, epilog=_epilog(command))
    parser.formatter_class = _raw_epilog(parser.formatter_class)
    for key in parser.add_function_arguments(command, as_positional=False):
        if inspect.signature(command, eval_str=True).parameters[key].annotation is bool:
            parser._option_string_actions[f"--{key}"].nargs = "?"  # in the help: the value may be left out
    try:
        values: Any = parser.parse_args(given)
    except ArgumentError as error:
        raise ValueError(f"{' '.join(str(error).split()).rstrip('.')}; see tpcompress {name} --help.") from error
    return values.as_dict()


def examples(command: Callable[..., int]) -> list[str]:
    """Example calls in the docstring of a command."""
    text = inspect.getdoc(command) or ""
    return re.findall(r"^Example:\n    (.+)$", text, flags=re.MULTILINE)


def _run_recipe(name: str, args: list[str]) -> int:
    """Run `fit` or `validate`, whose options are parsed by the recipe."""
    command = COMMANDS[name]
    if set(args) & set(HELP):
        text = f"tpcompress {name}: {_summary(command)}\n\n{_epilog(command)}\n"
        console.print(escape(text), highlight=False, soft_wrap=True)
    _quieten(name)
    return command([name, *map(underscored, args)])


def _print_usage() -> None:
    console.print(escape("usage: tpcompress COMMAND [options] [--traceback] | --version | --help"))
    for heading, commands in GROUPS.items():
        table = Table.grid(padding=(0, 2))
        for name, command in commands.items():
            table.add_row(f"  [bold]{name}[/bold]", escape(_summary(command)))
        console.print(f"\n{heading}")
        console.print(table)
    console.print("\ntpcompress COMMAND --help shows the options of a command and an example.")


def _summary(command: Callable[..., int]) -> str:
    return (inspect.getdoc(command) or "").partition("\n")[0]


def _epilog(command: Callable[..., int]) -> str:
    """Examples as they appear below the options."""
    found = examples(command)
    return "\n".join([f"example{'s' if len(found) > 1 else ''}:", *(f"  {line}" for line in found)])


def _raw_epilog(formatter: Any) -> Any:
    """A help formatter that keeps the lines of the epilog."""

    class Formatter(formatter):  # type: ignore[misc]
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            if text.startswith("example"):
                return text
            return str(super()._fill_text(text, width, indent))

    return Formatter


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
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt to reach the hub
    if name in TRAINING:
        import datasets
        import lightning  # noqa: F401  sets the levels of its loggers on import

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        for logger in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(logger).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
