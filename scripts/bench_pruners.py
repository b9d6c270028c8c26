"""Measure the time of every pruner relative to the prefill of one decoder layer of a 7B Llama, on random tensors.

    python scripts/bench_pruners.py --tokens 576 --batch 1
    python scripts/bench_pruners.py --json runs/pruners.json                    # all four sizes: an hour on one core
    python scripts/bench_pruners.py --device cuda --dtype bfloat16 --rounds 20

64 of 576, or 320 of 2880 vision tokens (five tiles of 24 x 24) are retained; the layer also processes 64 text tokens.
The layer and all pruners are timed in turns. Ctrl-C stops early and prints the results so far. The exit code is 1 if a
pruner failed.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench.arguments import make_parser, prepare
from bench.pruners import PrunerBench, Row, above, to_json
from bench.views import Cell, Sizes
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tpcompress.pruners import list_pruners
from tpcompress.pruners.registry import pruner_class


def main() -> int:
    """Measure every pruner; print one table, and the pruners that take longer than a layer."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[576, 2880], help="vision tokens; a ninth is retained")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pruners", nargs="+", default=list(list_pruners()), metavar="NAME")
    parser.add_argument("--full", action="store_true", help="time the layer with the whole batch (always on a GPU)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for times and settings, written at every step")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    console = prepare(arguments)
    full = arguments.full or arguments.device.startswith("cuda")
    sizes = Sizes(**{name: getattr(arguments, name) for name in vars(Sizes())})
    try:
        for name in arguments.pruners:
            pruner_class(name)
        cells = [Cell(tokens, batch) for tokens in arguments.tokens for batch in arguments.batch]
        dtype = getattr(torch, arguments.dtype)
        bench = PrunerBench(arguments.pruners, cells, arguments.rounds, arguments.device, dtype, full, sizes)
    except ValueError as error:
        parser.error(str(error))
    settings = {
        "device": arguments.device, "dtype": arguments.dtype, "threads": arguments.threads, "full": full,
        "rounds": arguments.rounds, "torch": torch.__version__, **vars(sizes),
    }  # fmt: skip
    ended = measure(bench, settings, arguments.json)
    show(console, bench, settings, ended)
    return int(any(row.error for row in bench.rows))


def measure(bench: PrunerBench, settings: dict[str, Any], out: Path | None) -> bool:
    """Run the benchmark with a progress bar; False if it was interrupted."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=bench.steps)
        try:
            for step in bench.run():
                bar.update(task, description=step, advance=1)
                if out:
                    out.write_text(to_json(bench.rows, settings))
            bar.update(task, description="done", completed=bench.steps)  # failed pruners skip steps
        except KeyboardInterrupt:
            return False
        finally:
            if out:
                out.write_text(to_json(bench.rows, settings))
    return True


def show(console: Console, bench: PrunerBench, settings: dict[str, Any], ended: bool) -> None:
    """Print a table with one line per pruner, and the pruners above one layer."""
    console.print(
        "Time of a selection / time of one decoder layer. Building the views (recomputed attention rows, keys, tower "
        "views) is not included; the projector is, if a merging pruner calls it."
    )
    table = Table("pruner")
    for cell in bench.cells:
        table.add_column(f"{cell.tokens} > {cell.keep}, batch {cell.batch}")
    names = dict.fromkeys(row.pruner for row in bench.rows)
    for name in names:
        table.add_row(escape(name), *[entry(row, bench.on_gpu) for row in bench.rows if row.pruner == name])
    console.print(table)
    console.print(caption(settings, ended))
    slow = above(bench.rows)
    console.print("Above one layer:" if slow else "No timed pruner is above one layer.")
    for row in slow:
        always = "" if min(row.ratios) > 1 else ", not in every round"
        console.print(
            f"  {row.pruner}, {row.tokens} tokens, batch {row.batch}: {row.ratio:.2f}{always}", highlight=False
        )


def entry(row: Row, on_gpu: bool) -> str:
    """One table entry: median and range of the ratios, on a GPU also milliseconds and graph; or the error."""
    if row.ratio is None:
        return f"[red]{escape(row.error)}[/]" if row.error else escape(row.note or "not reached")
    colour = "red" if row.ratio > 1 else "green"
    low, high = min(row.ratios), max(row.ratios)
    text = f"[{colour}]{row.ratio:#.3g}[/] {escape(f'[{low:#.3g}, {high:#.3g}]')}"
    milliseconds = f" {1000 * statistics.median(row.seconds):.2f} ms" if on_gpu else ""
    graph = f", graph {row.graph}" if row.graph else ""
    return text + milliseconds + escape(graph)


def caption(settings: dict[str, Any], ended: bool) -> str:
    """Description of the measurement."""
    layer = (
        "The layer is timed with the whole batch."
        if settings["full"]
        else "The layer is timed with one sample, multiplied by the batch size: within 10 % of the full batch on one "
        "CPU thread, and in favour of the pruners where batching is faster; --full times the full batch."
    )
    where = ", ".join([settings["dtype"], settings["device"], f"{settings['threads']} thread(s)"])
    end = "" if ended else " Interrupted: results so far."
    return f"{settings['rounds']} interleaved round(s), median and range of their ratios. {where}. {layer}{end}"


if __name__ == "__main__":
    sys.exit(main())
