"""The tables of a study, from the cells that are finished: Markdown, CSV and JSON, and between markers of a README."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.scoring.metrics import Unit, find_metric
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.seeds import gain_of, pooled, score_of
from tpcompress.evaluation.scoring.stats import Estimate
from tpcompress.evaluation.tables import UNKNOWN, Table, markdown, to_csv, to_json
from tpcompress.files import write_atomic
from tpcompress.lab.study.cells import CONTROL, DENSE, FREE, StudyCell
from tpcompress.lab.study.config import Study

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
HOW = (
    "Mean over the families that the base has learnt (its score is clearly above the one on blanked images, by at "
    "least 10 points of accuracy). Families marked * are not learnt and not in the mean. "
    "± is half a 95 % interval over seeds and images at once: variance over seeds / seeds + bootstrap variance over "
    "images of the seed-averaged answers, Welch-Satterthwaite t. Gains are paired, seed by seed and image by image; "
    "bold where the interval excludes zero. (n) is the number of seeds where some are missing."
)


@dataclass(frozen=True)
class Results:
    """The finished cells of a study.

    Attributes:
        study: the study.
        cells: all of its cells.
        bench: results on disk.
    """

    study: Study
    cells: Sequence[StudyCell]
    bench: Bench

    @cached_property
    def learnt(self) -> list[str] | None:
        """Families in which the image matters to the base; None (all) until base and blank baseline are there."""
        return self.bench.learnt(*self.cells[:2])

    @cached_property
    def families(self) -> list[str]:
        """All families, as the columns of a table are named."""
        dense = self.bench.scores(self.cells[0])
        names = () if dense is None else dense.names
        return [name if self.learnt is None or name in self.learnt else f"{name}*" for name in names]

    @cached_property
    def answers(self) -> dict[tuple[Any, ...], dict[int, Scores]]:
        """Scores of the finished cells, by setting, then by seed."""
        found: dict[tuple[Any, ...], dict[int, Scores]] = {}
        seeded = {contender.name for contender in self.study.contenders if contender.seeded}
        for cell in self.cells:
            scores = self.bench.scores(cell)
            if scores is not None:
                of_seeds, seed = found.setdefault(cell.setting, {}), cell.labels["seed"]
                of_seeds[seed] = scores.with_learnt(self.learnt)
                if cell.run is None and cell.labels["pruner"] not in seeded:
                    found[cell.setting] = dict.fromkeys(self.study.seeds, of_seeds[seed])  # no seed can change it
        return found

    def of(
        self,
        table: str,
        way: str,
        pruner: str,
        budget: int | None,
        tested: str | None = None,
        tested_budget: int | None = None,
    ) -> dict[int, Scores]:
        """Scores by seed; empty where nothing is there."""
        return self.answers.get((table, pruner, way, budget, tested, tested_budget), {})

    def arm(self, way: str, pruner: str, budget: int) -> dict[int, Scores]:
        """A cell of the grid: tested as it was trained."""
        return self.of("grid", way, pruner, budget if way not in (FREE, CONTROL) else None, pruner, budget)


def write_tables(study: Study, cells: Sequence[StudyCell], bench: Bench, into: str | Path | None = None) -> None:
    """Write tables.md, tables.csv and tables.json of the finished cells.

    Args:
        study: the study.
        cells: all of its cells.
        bench: results on disk; the tables are written to its folder.
        into: a document whose tables, between its two markers, are replaced.

    Raises:
        ValueError: the document has no markers.
    """
    results = Results(study, cells, bench)
    tables = [table for make in MAKERS for table in make(results)]
    done = sum(bench.record(cell) is not None for cell in cells)
    metric = find_metric(bench.metric)
    how = (
        f"{metric.title} in {metric.unit.title}. {done} of {len(cells)} cells, {len(bench.task.rows)} held-out images, "
    )
    lines = [f"{how}seeds {', '.join(map(str, study.seeds))}. {HOW}", ""]
    show = partial(cell_text, seeds=len(study.seeds), unit=metric.unit)
    text = "\n".join([*lines, *(line for table in tables for line in markdown(table, 3, show))])
    bench.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(bench.folder / "tables.md", text)
    numbers = [number for table in tables for number in numbers_of(table)]
    write_atomic(bench.folder / "tables.csv", to_csv(numbers, ("table", "row", "column", "mean", "half", "seeds")))
    write_atomic(bench.folder / "tables.json", to_json(numbers))
    if into is not None:
        write_atomic(Path(into), fill(Path(into).read_text(encoding="utf-8"), text))


def fill(text: str, tables: str) -> str:
    """A document with the tables between its markers.

    Raises:
        ValueError: it has no markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The document has no place for the tables; write {BEGIN} and {END} where they belong.")
    return f"{head}{begin}\n\n{tables.strip()}\n\n{end}{tail}"


def cell_text(cell: Any, seeds: int, unit: Unit) -> str:
    """A cell as text: `83.1 ± 1.2`, a clear gain in bold, the number of seeds where some are missing."""
    if not isinstance(cell, Estimate):
        return str(cell)
    text = f"{unit.change(cell.mean) if cell.is_gain else unit.number(cell.mean)} ± {unit.number(cell.half)}"
    text = f"**{text}**" if cell.is_gain and cell.clear else text
    return text if cell.seeds == seeds else f"{text} ({cell.seeds})"


def numbers_of(table: Table) -> list[dict[str, Any]]:
    """The numbers of a table as records: table, row, column, mean, half width, seeds."""
    found: list[dict[str, Any]] = []
    for row in table.rows:
        names = itertools.takewhile(lambda cell: isinstance(cell, str) and cell != UNKNOWN, row)
        place = {"table": table.name, "row": " / ".join(names)}
        for column, cell in zip(table.header, row, strict=True):
            if isinstance(cell, Estimate):
                found.append(place | {"column": column, "mean": cell.mean, "half": cell.half, "seeds": cell.seeds})
    return found


# ---------------------------------------------------------------------------------------------------- tables


def reference(results: Results) -> list[Table]:
    """Rows without pruning: the base, its blank baseline, and the control."""
    rows = []
    for name, key in (
        ("base", ("base", FREE, DENSE, None)),
        ("base, images blanked", ("base", "blind", DENSE, None)),
        (f"{CONTROL}, same steps", ("grid", CONTROL, DENSE, None)),
    ):
        runs = results.of(*key)
        rows.append([name, _score(runs), *_families(runs, results)])
    return [Table("Without pruning", ["model", "score", *results.families], [rows], name="reference")]


def grid(results: Results) -> list[Table]:
    """One table per budget: scores of every arm and the gains of training with the pruner."""
    study, tables = results.study, []
    ways = [way.name for way in study.ways]
    header = ["pruner", FREE, CONTROL, *ways]
    header += [f"{way} − {against}" for way in ways for against in ("control", "free")]
    for budget in sorted(study.budgets, reverse=True):
        rows = []
        for contender in study.contenders:
            arms = {way: results.arm(way, contender.name, budget) for way in (FREE, CONTROL, *ways)}
            gains = [_gain(arms[way], arms[against]) for way in ways for against in (CONTROL, FREE)]
            rows.append([contender.name, *(_score(runs) for runs in arms.values()), *gains])
        tables.append(Table(f"{budget} tokens", header, [rows], name=f"grid-{budget}"))
    return tables


def by_family(results: Results) -> list[Table]:
    """One table per budget: families beside the mean, every arm."""
    study, tables = results.study, []
    for budget in sorted(study.budgets, reverse=True):
        rows = []
        for contender in study.contenders:
            for way in (FREE, CONTROL, *(way.name for way in study.ways)):
                runs = results.arm(way, contender.name, budget)
                rows.append([contender.name, way, _score(runs), *_families(runs, results)])
        header = ["pruner", "arm", "score", *results.families]
        tables.append(Table(f"Families at {budget} tokens", header, [rows], name=f"families-{budget}"))
    return tables


def over_budgets(results: Results) -> list[Table]:
    """Trained at one budget, tested at another, for every pruner; training-free and control rows above."""
    study, way = results.study, results.study.ways[0].name
    budgets = sorted(study.budgets, reverse=True)
    rows = []
    for contender in study.contenders:
        name = contender.name
        for label in (FREE, CONTROL):
            dense = results.of("base", FREE, DENSE, None) if label == FREE else results.of("grid", CONTROL, DENSE, None)
            tested = [results.arm(label, name, other) for other in budgets]
            rows.append([name, label, _score(dense), *map(_score, tested)])
        for budget in budgets:
            tested = [
                results.arm(way, name, budget)
                if budget == other
                else results.of("budgets", way, name, budget, name, other)
                for other in budgets
            ]
            dense = results.of("budgets", way, name, budget)
            rows.append([name, str(budget), _score(dense), *map(_score, tested)])
    header = ["pruner", "trained at", "tested at all", *map(str, budgets)]
    return [Table(f"Trained at one budget, tested at another ({way})", header, [rows], name="budgets")]


def over_pruners(results: Results) -> list[Table]:
    """Trained with one pruner (rows), tested with another (columns), at the focus budget."""
    study, way, budget = results.study, results.study.ways[0].name, results.study.focus
    names = [contender.name for contender in study.contenders]
    rows = [[label, *(_score(results.arm(label, name, budget)) for name in names)] for label in (FREE, CONTROL)]
    for name in names:
        tested = [
            results.arm(way, name, budget) if other == name else results.of("pruners", way, name, budget, other, budget)
            for other in names
        ]
        rows.append([name, *map(_score, tested)])
    title = f"Trained with one pruner, tested with another ({budget} tokens, {way})"
    note = "A learned pruner, tested on a model that was trained with another one, has the weights of its own run."
    return [Table(title, ["trained with", *names], [rows], note, "pruners")]


def ablations(results: Results) -> list[Table]:
    """Changes to one arm, with the paired difference to the arm as it is in the grid."""
    study, budget, rows = results.study, results.study.focus, []
    for contender, way in dict.fromkeys((a.contender, a.way) for a in study.ablations):
        plain = results.arm(way, contender, budget)
        rows.append([contender, way, "as it is", _score(plain), UNKNOWN])
        for ablation in study.ablations:
            if (ablation.contender, ablation.way) == (contender, way):
                runs = results.of("ablations", f"{way}: {ablation.name}", contender, budget, contender, budget)
                rows.append([contender, way, ablation.name, _score(runs), _gain(runs, plain)])
    if not rows:
        return []
    header = ["pruner", "arm", "change", "score", "gain"]
    return [Table(f"Ablations at {budget} tokens", header, [rows], name="ablations")]


MAKERS: tuple[Callable[[Results], list[Table]], ...] = (
    reference, grid, over_budgets, over_pruners, ablations, by_family,
)  # fmt: skip


def _score(runs: dict[int, Scores]) -> Any:
    return score_of(list(runs.values())) if runs else UNKNOWN


def _gain(runs: dict[int, Scores], others: dict[int, Scores]) -> Any:
    """The gain over the seeds that both sides have."""
    both = [seed for seed in runs if seed in others]
    if not both:
        return UNKNOWN
    return gain_of([runs[seed] for seed in both], [others[seed] for seed in both])


def _families(runs: dict[int, Scores], results: Results) -> list[str]:
    if not runs:
        return [UNKNOWN] * len(results.families)
    unit = find_metric(results.bench.metric).unit
    digits = max(0, unit.digits - 1)
    return [f"{unit.scale * value:.{digits}f}" for value in pooled(list(runs.values())).families.values()]
