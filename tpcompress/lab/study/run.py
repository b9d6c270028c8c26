"""Runs a study: makes its cells on the bench and writes its tables."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from tpcompress.evaluation.engine.bench import Bench
from tpcompress.lab.study.cells import cells_of
from tpcompress.lab.study.config import Study
from tpcompress.lab.study.tables import write_tables


def run_study(
    config: str | Study, out: str | Path | None, console: Console, tables: bool = False, into: str | Path | None = None
) -> Path:
    """Make every cell that the output directory lacks, then the tables. Several processes may share the directory.

    Args:
        config: a study, or its file.
        out: output directory; default: the study's.
        console: console for progress.
        tables: only make the tables of the finished cells.
        into: a document whose tables, between its two markers, are replaced.

    Returns:
        The output directory.

    Raises:
        FileNotFoundError, ValueError: a mistake in the file, an output directory of other settings, or a document
            without markers.
        KeyboardInterrupt: interrupted; what is finished is kept.
    """
    study = Study.from_file(config) if isinstance(config, str) else config
    cells, bench = cells_of(study), open_bench(study, out, console)
    bench.check(cells)
    if not tables:
        start = time.perf_counter()
        made = bench.work(cells)
        console.print(f"{made} cells in {(time.perf_counter() - start) / 60:.0f} min", highlight=False)
    write_tables(study, cells, bench, into)
    console.print(f"[bold]{bench.folder}[/bold]: tables.md, tables.csv, tables.json", soft_wrap=True)
    return bench.folder


def open_bench(study: Study, out: str | Path | None, console: Console) -> Bench:
    """The bench of a study, with many short runs."""
    folder, metric = Path(out or study.out), study.metric or ""
    return Bench(study.base, study.make_task(), folder, console, metric, study.batch_size, many_runs=True)
