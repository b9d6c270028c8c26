"""What choosing costs: every pruner's time relative to one decoder layer's prefill of a 7B Llama, in random numbers.

    python scripts/bench_pruners.py --tokens 576 --batch 1
    python scripts/bench_pruners.py --json runs/pruners.json                    # all four sizes: an hour on one core
    python scripts/bench_pruners.py --device cuda --dtype bfloat16 --rounds 20

576 vision tokens keep 64, 2880 (five tiles of 24 x 24) keep 320; the layer sees 64 words beside them. The layer and all
pruners take turns. Ctrl-C ends early with what there is. Exit code 1 if a pruner failed.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench.pruners import PrunerBench, Row, above, to_json
from bench.views import Cell, Sizes
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tpcompress.pruners import list_pruners
from tpcompress.pruners.registry import pruner_class


def main() -> int:
    """Parse arguments, measure every pruner, print one table and who takes longer than a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[576, 2880], help="vision tokens; a ninth is kept")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pruners", nargs="+", default=list(list_pruners()), metavar="NAME")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--full", action="store_true", help="time the layer with the whole batch (always on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write times and settings here after every step")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
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
    console = Console(width=None if sys.stdout.isatty() else 150)  # a log must hold all columns
    show(console, bench, settings, ended)
    return int(any(row.error for row in bench.rows))


def measure(bench: PrunerBench, settings: dict[str, Any], out: Path | None) -> bool:
    """Run the benchmark with a bar; False if it was interrupted."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=bench.steps)
        try:
            for step in bench.run():
                bar.update(task, description=step, advance=1)
                if out:
                    out.write_text(to_json(bench.rows, settings))
            bar.update(task, description="done", completed=bench.steps)  # some steps were not needed
        except KeyboardInterrupt:
            return False
        finally:
            if out:
                out.write_text(to_json(bench.rows, settings))
    return True


def show(console: Console, bench: PrunerBench, settings: dict[str, Any], ended: bool) -> None:
    """The table, one line per pruner, and below it the pruners above one layer."""
    console.print(
        "Time of choosing / time of one decoder layer. Not in it: making the views (recomputed attention rows, keys, "
        "tower views), which is insertion's cost. In it: the projector, where a pruner that merges calls it."
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
    console.print("Above one layer:" if slow else "No pruner that was timed is above one layer.")
    for row in slow:
        always = "" if min(row.ratios) > 1 else ", not in every round"
        console.print(
            f"  {row.pruner}, {row.tokens} tokens, batch {row.batch}: {row.ratio:.2f}{always}", highlight=False
        )


def entry(row: Row, on_gpu: bool) -> str:
    """One pruner in one cell: median of the ratios and their range, milliseconds and graph on a GPU; or why not."""
    if row.ratio is None:
        return f"[red]{escape(row.error)}[/]" if row.error else escape(row.note or "not reached")
    colour = "red" if row.ratio > 1 else "green"
    low, high = min(row.ratios), max(row.ratios)
    text = f"[{colour}]{row.ratio:#.3g}[/] {escape(f'[{low:#.3g}, {high:#.3g}]')}"
    milliseconds = f" {1000 * statistics.median(row.seconds):.2f} ms" if on_gpu else ""
    graph = f", graph {row.graph}" if row.graph else ""
    return text + milliseconds + escape(graph)


def caption(settings: dict[str, Any], ended: bool) -> str:
    """How it was measured."""
    layer = (
        "The layer is timed with the whole batch."
        if settings["full"]
        else "The layer of a batch is timed with one sample, times the samples: within a tenth of the whole on one "
        "CPU thread, generous to the pruners wherever a batch is quicker than its samples one by one; --full times it "
        "whole."
    )
    where = ", ".join([settings["dtype"], settings["device"], f"{settings['threads']} thread(s)"])
    end = "" if ended else " Interrupted: what there was until then."
    return f"{settings['rounds']} interleaved round(s), median and range of their ratios. {where}. {layer}{end}"


if __name__ == "__main__":
    sys.exit(main())
