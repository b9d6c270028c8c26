"""Measure the collator against the bare processor of every family, and whether workers keep a training step fed.

    python scripts/bench_collator.py
    python scripts/bench_collator.py --families qwen2_5_vl internvl --width 1280 --height 960
    python scripts/bench_collator.py --families qwen2_5_vl --workers 4 --step 0.5

Processors are the real classes with the default sizes of their image processors and tiny vocabularies. Times are
processor time, which other processes hardly affect; both are measured in turns. With --workers, the share of the time
that a step of --step seconds waits for its batch is printed.
"""

import argparse
import sys

import torch
from bench.collator import make_rows, measure, waiting
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpcompress.families import list_families


def main() -> int:
    """Print a table with one line per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(list_families()), metavar="NAME")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--width", type=int, default=640, help="width of the images in pixels")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0 leaves out the steps")
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a training step")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.families) - set(list_families()))
    if unknown:
        parser.error(f"unknown families {', '.join(unknown)}; choose from {', '.join(list_families())}")
    torch.set_num_threads(1)
    rows = make_rows(arguments.rows, arguments.width, arguments.height)
    table = Table("family", "collator rows/s", "processor rows/s", "time / processor", "time / processor row by row")
    if arguments.workers:
        table.add_column(f"waiting of {arguments.step:g} s steps, {arguments.workers} workers")
    for row in measure(arguments.families, rows, arguments.rounds):
        if row.ratios is None:
            table.add_row(row.family, escape(row.error))
            continue
        rates = [f"{1 / min(times):.1f}" for times in (row.collator, row.bare)]
        cells = [row.family, *rates, *(f"{ratio:.2f}" for ratio in row.ratios)]
        if arguments.workers:
            settings = (arguments.workers, arguments.step, arguments.rows, arguments.steps)
            cells.append(f"{100 * waiting(row.family, rows, *settings):.1f} %")
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(
        f"{arguments.rounds} rounds in turns, batches of {arguments.rows} rows with one image of {arguments.width} x "
        f"{arguments.height}. Rates are of the fastest round, ratios medians. One thread."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
