"""Command-line arguments that the benchmark scripts share, and the settings that follow from them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from rich.console import Console

from bench.models import Shape

DTYPES = ("float32", "bfloat16", "float16")
LOG_WIDTH = 150
"""Columns of a table that is not printed to a terminal, so that no column is cut off."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the docstring of the script, with the arguments of the machine."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add the arguments of the model, its pruner and the number of rounds.

    Args:
        parser: parser from `make_parser`.
        repeats: default number of rounds.
    """
    parser.add_argument("--pruner", default="uniform")
    parser.add_argument("--keep", nargs="+", type=int, default=[144, 64], help="retained vision tokens")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds, each of all variants")
    parser.add_argument("--attention", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)


def run(main: Callable[[], int]) -> int:
    """Run a script; an invalid setting is printed in one line, with exit code 2."""
    try:
        return main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The model sizes of parsed arguments."""
    return Shape(**{name: getattr(arguments, name) for name in vars(Shape())})


def clock_of(arguments: argparse.Namespace) -> str:
    """`wall` on a GPU, else `cpu`: processor time, which other processes hardly affect."""
    return "wall" if arguments.device.startswith("cuda") else "cpu"


def prepare(arguments: argparse.Namespace) -> Console:
    """Set the number of threads and return a console for the tables."""
    torch.set_num_threads(arguments.threads)
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def time_and_memory(clock: str) -> tuple[str, str]:
    """Descriptions of the time and memory measurements, for captions."""
    if clock == "cpu":
        return "processor time", "peak of live tensors between operations"
    return "wall clock", "peak of the allocator"
