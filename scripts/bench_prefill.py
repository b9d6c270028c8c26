"""What a prefill costs with pruning, for a LLaVA-shaped and a Qwen-shaped model of random weights.

    python scripts/bench_prefill.py
    python scripts/bench_prefill.py --device cuda --dtype bfloat16 --layers 32 --width 4096 --heads 32 --mlp 11008

576 vision tokens and 64 words in one prompt; a stage before the language model and one at layer 2 keep a quarter and a
ninth. `ideal` is the same decoder fed natively with the short sequence (for layer 2: two layers long, the rest short),
so the ratio is what the hooks and the pruner cost. Vision towers run before the clock starts. FLOPs are those of matrix
products; `extra` is what the stage has beyond the ideal (0 for random). Exit code 1 if a ratio is above 1.05 by more
than its 95 % interval.
"""

import argparse
import sys

import torch
from bench.models import MODELS, Shape
from bench.prefill import LIMIT, Measured, make_cases, measure
from rich.console import Console
from rich.table import Table


def main() -> int:
    """Parse arguments, measure every case, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pruner", default="uniform")
    parser.add_argument("--layer", nargs="+", type=int, default=[0, 2], help="where the stage acts")
    parser.add_argument("--keep", nargs="+", type=int, default=[144, 64], help="vision tokens that it keeps")
    parser.add_argument("--positions", choices=("original", "compact"), default="original")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each of full, ideal, pruned and ideal again")
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
    """The table: time, FLOPs and memory of full, ideal and pruned side by side."""
    table = Table(
        "model", "layer", "keep", "ms full", "ideal", "pruned", "pruned / ideal", "ideal / ideal", "GFLOP full",
        "ideal", "extra", "MiB full", "ideal", "pruned",
        title=f"Prefill of {shape.side**2} vision tokens and {shape.text} words, {arguments.pruner}",
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
    seconds = "time the process computed" if clock == "cpu" else "wall clock"
    memory = "the allocator's peak" if clock == "wall" else "tensors alive between operations, at most"
    return (
        f"{shape.layers} layers x {shape.width}, {arguments.dtype}, {arguments.attention}, {arguments.device}, "
        f"{arguments.threads} thread(s). ms: {seconds}, median of {arguments.repeats} interleaved rounds. Ratios: "
        f"median of pairs and 95 % interval, limit {LIMIT}. MiB: {memory}, without weights. Language part only."
    )


if __name__ == "__main__":
    sys.exit(main())
