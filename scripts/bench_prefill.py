"""Measure the cost of a prefill with pruning, for a LLaVA-like and a Qwen-like model with random weights.

    python scripts/bench_prefill.py
    python scripts/bench_prefill.py --device cuda --dtype bfloat16 --layers 32 --width 4096 --heads 32 --mlp 11008

The prompt has 576 vision tokens and 64 text tokens; a stage before the language model or at layer 2 retains a quarter
or a ninth. `ideal` is the same decoder on the natively short sequence (for layer 2: two layers on the full sequence,
the rest on the short one), so that the ratio is the overhead of hooks and pruner. The vision tower is not timed. FLOPs
are those of matrix products; `extra` are the FLOPs beyond the ideal (0 for random). The exit code is 1 if a ratio is
significantly above 1.05.
"""

import argparse
import sys

import torch
from bench.arguments import add_model_arguments, clock_of, make_parser, prepare, run, shape_of, time_and_memory
from bench.models import MODELS, Shape
from bench.prefill import LIMIT, Measured, make_cases, measure
from rich.console import Console
from rich.table import Table


def main() -> int:
    """Measure every case and print one table."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layer", nargs="+", type=int, default=[0, 2], help="layers of the stage")
    parser.add_argument("--positions", choices=("original", "compact"), default="original")
    add_model_arguments(parser, repeats=20)
    arguments = parser.parse_args()
    console, shape, clock = prepare(arguments), shape_of(arguments), clock_of(arguments)
    rows = []
    for name in arguments.model:
        cases = make_cases(
            name, shape, arguments.pruner, arguments.layer, arguments.keep, arguments.device,
            getattr(torch, arguments.dtype), arguments.attention, arguments.positions,
        )  # fmt: skip
        for case in cases:
            with console.status(f"{name}: layer {case.layer}, {case.keep} tokens"):
                rows.append(measure(case, arguments.repeats, clock, arguments.device))
    show(console, rows, shape, arguments, clock)
    return 0 if all(row.ok for row in rows) else 1


def show(console: Console, rows: list[Measured], shape: Shape, arguments: argparse.Namespace, clock: str) -> None:
    """Print time, FLOPs and memory of full, ideal and pruned."""
    table = Table(
        "model", "layer", "keep", "ms full", "ideal", "pruned", "pruned / ideal", "ideal / ideal", "GFLOP full",
        "ideal", "extra", "MiB full", "ideal", "pruned",
        title=f"Prefill of {shape.side**2} vision tokens and {shape.text} text tokens, {arguments.pruner}",
        caption=_caption(shape, arguments, clock),
    )  # fmt: skip
    for row in rows:
        (full, ideal, pruned), peaks = row.flops, [f"{size / 2**20:.1f}" for size in row.peak]
        colour = "green" if row.ok else "red"
        table.add_row(
            row.case.model, str(row.case.layer), str(row.case.keep), *[f"{1000 * s:.1f}" for s in row.seconds],
            f"[{colour}]{str(row.ratio).replace('[', chr(92) + '[')}[/]", str(row.control).replace("[", "\\["),
            f"{full / 1e9:.3f}", f"{ideal / 1e9:.3f}", f"{(pruned - ideal) / 1e9:.4f}", *peaks,
        )  # fmt: skip
    console.print(table)


def _caption(shape: Shape, arguments: argparse.Namespace, clock: str) -> str:
    time, memory = time_and_memory(clock)
    return (
        f"{shape.layers} layers x {shape.width}, {arguments.dtype}, {arguments.attention}, {arguments.device}, "
        f"{arguments.threads} thread(s). ms: {time}, median of {arguments.repeats} interleaved rounds. Ratios: "
        f"median of pairs and 95 % interval, limit {LIMIT}. MiB: {memory}, without weights. Language part only."
    )


if __name__ == "__main__":
    sys.exit(run(main))
