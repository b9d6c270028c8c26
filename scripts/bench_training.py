"""What a training step costs with pruning in its loop, for a LLaVA-shaped model of random weights.

    python scripts/bench_training.py
    python scripts/bench_training.py --adapt lora --checkpointing --device cuda --dtype bfloat16 --batch_size 8 \\
        --layers 32 --width 4096 --heads 32 --mlp 11008 --vocab 32064        (the shape of 7B on a GPU)

576 vision tokens and 64 words per sample, 16 of them answers; a stage before the language model keeps a quarter and a
ninth. `masked` runs the full length with the dropped tokens hidden, `gathered` the truly shorter sequence. All arms
share weights, batch and optimizer, and take turns, so that ratios are of neighbouring steps. Pictures are encoded
before the clock starts. Exit code 1 if a gathered step at a ninth takes more than 0.45 of a dense one, beyond the 95 %
interval.
"""

import argparse
import sys

import torch
from bench.models import Shape
from bench.training import ADAPT, LIMIT, Measured, Work, make_arms, measure
from rich.console import Console
from rich.table import Table


def main() -> int:
    """Parse arguments, measure every arm, print one table per way to adapt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapt", nargs="+", choices=ADAPT, default=list(ADAPT))
    parser.add_argument("--pruner", default="uniform")
    parser.add_argument("--keep", nargs="+", type=int, default=[144, 64], help="vision tokens that the stage keeps")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="recompute decoder layers in the backward pass")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each of every arm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--attention", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape(**{name: getattr(arguments, name) for name in vars(Shape())})
    clock = "wall" if arguments.device.startswith("cuda") else "cpu"
    console = Console(width=None if sys.stdout.isatty() else 150)  # a log must hold all columns
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
    """The table of one way to adapt."""
    table = Table(
        "step", "keep", "ms", "tokens/s", "time / dense", "GFLOP", "GFLOP / dense", "MiB", "MiB / dense",
        title=f"Training steps, {work.adapt}: {work.batch_size} x ({work.shape.side**2} vision tokens and "
        f"{work.shape.text} words), {arguments.pruner}",
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
    seconds = "time the process computed" if clock == "cpu" else "wall clock"
    memory = "the allocator's peak" if clock == "wall" else "tensors alive between operations, at most"
    again = "decoder layers recomputed" if work.checkpointing else "no checkpointing"
    return (
        f"{work.shape.layers} layers x {work.shape.width}, {arguments.dtype}, {arguments.attention}, "
        f"{arguments.device}, {arguments.threads} thread(s), {again}. ms: {seconds}, median of {arguments.repeats} "
        f"interleaved rounds. tokens/s: of the batch as it comes. Ratios: median of pairs and 95 % interval, limit "
        f"{LIMIT} at a ninth. MiB: {memory}, without weights and optimizer state. Language part only."
    )


if __name__ == "__main__":
    sys.exit(main())
