"""The `tpcompress` command: finds what was asked for, reads its options, and says in one line what went wrong."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpcompress.cli.commands import COMMANDS, console
from tpcompress.errors import did_you_mean, missing_extra

TRACEBACK = "--traceback"
NOISE = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*",
    ".*_pytree.*",
    ".*across ranks is zero.*",
)


def main(args: list[str] | None = None) -> int:
    """Run one command; errors that a user can mend become one line and exit code 2 (`--traceback` shows all)."""
    args = list(sys.argv[1:] if args is None else args)
    show_traceback = TRACEBACK in args
    args = [a for a in args if a != TRACEBACK]
    if not args or args[0] in ("-h", "--help", "help"):
        _usage()
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        return _fail(f"No command '{name}'. Commands: {', '.join(COMMANDS)}.{hint}")
    try:
        _quieten(name)
        if name in ("fit", "validate"):
            return COMMANDS[name](args)
        return _call(name, COMMANDS[name], rest)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "Interrupted.", 130)
    except Exception as error:
        if show_traceback:
            raise
        hint = missing_extra(error) if isinstance(error, ImportError) else None
        return _fail(hint or _one_line(error))


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


def _usage() -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
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
