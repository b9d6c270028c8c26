"""Measure the cost of a training step with pruning, for a LLaVA-like model with random weights.

    python scripts/bench_training.py
    python scripts/bench_training.py --adapt lora --checkpointing --device cuda --dtype bfloat16 --batch_size 8 \\
        --layers 32 --width 4096 --heads 32 --mlp 11008 --vocab 32064        (the sizes of a 7B model on a GPU)

Each sample has 576 vision tokens and 64 text tokens, 16 of them answers; a stage before the language model retains a
quarter or a ninth. `masked` runs at full length with dropped tokens masked, `gathered` on the shorter sequence. All
arms share weights, batch and optimizer, and are timed in turns, so that ratios are of neighbouring steps. Images are
encoded before timing. The exit code is 1 if a gathered step at a ninth takes significantly more than 0.45 of a dense
step.
"""

import argparse
import sys

import torch
from bench.arguments import add_model_arguments, clock_of, make_parser, prepare, run, shape_of, time_and_memory
from bench.training import ADAPT, LIMIT, Measured, Work, make_arms, measure
from rich.console import Console
from rich.table import Table


def main() -> int:
    """Measure every arm and print one table for each way to adapt."""
    parser = make_parser(__doc__)
    parser.add_argument("--adapt", nargs="+", choices=ADAPT, default=list(ADAPT))
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="recompute decoder layers in the backward pass")
    add_model_arguments(parser, repeats=10)
    arguments = parser.parse_args()
    console, shape, clock = prepare(arguments), shape_of(arguments), clock_of(arguments)
    good = True
    for adapt in arguments.adapt:
        work = Work(
            adapt, shape, arguments.batch_size, arguments.checkpointing, arguments.device,
            getattr(torch, arguments.dtype), arguments.attention,
        )  # fmt: skip
        with console.status(f"training steps, {adapt}"):
            rows = measure(work, make_arms(work, arguments.keep, arguments.pruner), arguments.repeats, clock)
        show(console, rows, work, arguments, clock)
        good = good and all(row.ok for row in rows)
    return 0 if good else 1


def show(console: Console, rows: list[Measured], work: Work, arguments: argparse.Namespace, clock: str) -> None:
    """Print the table of one way to adapt."""
    table = Table(
        "step", "keep", "ms", "tokens/s", "time / dense", "GFLOP", "GFLOP / dense", "MiB", "MiB / dense",
        title=f"Training steps, {work.adapt}: {work.batch_size} x ({work.shape.side**2} vision tokens and "
        f"{work.shape.text} text tokens), {arguments.pruner}",
        caption=_caption(work, arguments, clock),
    )  # fmt: skip
    for row in rows:
        colour = "green" if row.ok else "red"
        table.add_row(
            row.arm.name, "all" if row.arm.keep is None else str(row.arm.keep), f"{1000 * row.seconds:.0f}",
            f"{row.tokens_per_second:.0f}", f"[{colour}]{str(row.ratio).replace('[', chr(92) + '[')}[/]",
            f"{row.flops / 1e9:.1f}", f"{row.flops / rows[0].flops:.3f}", f"{row.peak / 2**20:.0f}",
            f"{row.peak / rows[0].peak:.3f}",
        )  # fmt: skip
    console.print(table)


def _caption(work: Work, arguments: argparse.Namespace, clock: str) -> str:
    time, memory = time_and_memory(clock)
    checkpointing = "decoder layers recomputed" if work.checkpointing else "no checkpointing"
    return (
        f"{work.shape.layers} layers x {work.shape.width}, {arguments.dtype}, {arguments.attention}, "
        f"{arguments.device}, {arguments.threads} thread(s), {checkpointing}. ms: {time}, median of "
        f"{arguments.repeats} interleaved rounds. tokens/s: tokens before pruning. Ratios: median of pairs and 95 % "
        f"interval, limit {LIMIT} at a ninth. MiB: {memory}, without weights and optimizer state. Language part only."
    )


if __name__ == "__main__":
    sys.exit(run(main))
