"""The tables of a study, from the cells that are there: Markdown, CSV and JSON, and a README between its markers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tpcompress.evaluation.scoring.evaluate import Scores, learnt_families
from tpcompress.evaluation.scoring.seeds import gain_of, pooled, score_of
from tpcompress.files import write_atomic
from tpcompress.lab.study.cells import CONTROL, DENSE, FREE, Cell
from tpcompress.lab.study.config import Study
from tpcompress.lab.study.text import UNKNOWN, Table, fill, to_csv, to_json, to_markdown


@dataclass(frozen=True)
class Results:
    """What is known of a study.

    Attributes:
        study: what was asked.
        cells: all of it.
        folder: where the results are.
    """

    study: Study
    cells: Sequence[Cell]
    folder: Path

    @cached_property
    def learnt(self) -> list[str] | None:
        """Families in which the image matters to the base; None (all) until base and blind base were tested."""
        dense, blind = self._answers("base-dense"), self._answers("base-blind")
        return None if dense is None or blind is None else learnt_families(dense, blind)

    @cached_property
    def families(self) -> list[str]:
        """All families, as the columns of a table are named."""
        dense = self._answers("base-dense")
        names = () if dense is None else dense.names
        return [name if self.learnt is None or name in self.learnt else f"{name}*" for name in names]

    @cached_property
    def answers(self) -> dict[tuple[Any, ...], dict[int, Scores]]:
        """Scores of what is there, by what makes a cell but its seed, then by seed."""
        found: dict[tuple[Any, ...], dict[int, Scores]] = {}
        for cell in self.cells:
            scores = self._answers(cell.name)
            if scores is not None:
                key = (cell.table, cell.way, cell.pruner, cell.budget, cell.tested, cell.tested_budget)
                found.setdefault(key, {})[cell.seed] = scores.with_learnt(self.learnt)
                if cell.training is None and not any(cell.pruner == c.name and c.seeded for c in self.study.contenders):
                    found[key] = dict.fromkeys(self.study.seeds, found[key][cell.seed])  # no seed could change it
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
        return self.answers.get((table, way, pruner, budget, tested, tested_budget), {})

    def arm(self, way: str, pruner: str, budget: int) -> dict[int, Scores]:
        """A cell of the grid: tested as it was trained."""
        return self.of("grid", way, pruner, budget if way not in (FREE, CONTROL) else None, pruner, budget)

    def _answers(self, name: str) -> Scores | None:
        path = self.folder / "cells" / f"{name}.npz"
        return Scores.load(path) if path.with_suffix(".json").is_file() else None


def write_tables(study: Study, cells: Sequence[Cell], folder: Path, into: str | Path | None = None) -> None:
    """Write tables.md, tables.csv and tables.json of what is there.

    Args:
        study: what was asked.
        cells: all of it.
        folder: where the results are, and where the tables go.
        into: a document whose tables are made anew.

    Raises:
        ValueError: the document has no markers.
    """
    results = Results(study, cells, folder)
    tables = [table for make in MAKERS for table in make(results)]
    folder.mkdir(parents=True, exist_ok=True)
    done = sum((folder / "cells" / f"{cell.name}.json").is_file() for cell in cells)
    text = to_markdown(study, tables, done, len(cells))
    write_atomic(folder / "tables.md", text)
    write_atomic(folder / "tables.csv", to_csv(tables))
    write_atomic(folder / "tables.json", to_json(tables))
    if into is not None:
        write_atomic(Path(into), fill(Path(into).read_text(encoding="utf-8"), text))


# ---------------------------------------------------------------------------------------------------- tables


def reference(results: Results) -> list[Table]:
    """What is not pruned: the base, its blind self, and the control."""
    rows = []
    for name, key in (
        ("base", ("base", FREE, DENSE, None)),
        ("base, images blanked", ("base", "blind", DENSE, None)),
        (f"{CONTROL}, same steps", ("grid", CONTROL, DENSE, None)),
    ):
        runs = results.of(*key)
        rows.append([name, _score(runs), *_families(runs, results)])
    return [Table("reference", "Without pruning", ["model", "score", *results.families], rows)]


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
        tables.append(Table(f"grid-{budget}", f"{budget} tokens", header, rows))
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
        tables.append(Table(f"families-{budget}", f"Families at {budget} tokens", header, rows))
    return tables


def over_budgets(results: Results) -> list[Table]:
    """Trained at one budget, tested at another, every pruner; with what was not trained so above it."""
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
    return [Table("budgets", f"Trained at one budget, tested at another ({way})", header, rows)]


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
    note = "A learned pruner tested on a model that was trained with another brings the weights of its own run."
    return [Table("pruners", title, ["trained with", *names], rows, note)]


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
    return [Table("ablations", f"Ablations at {budget} tokens", ["pruner", "arm", "change", "score", "gain"], rows)]


MAKERS: tuple[Callable[[Results], list[Table]], ...] = (
    reference, grid, over_budgets, over_pruners, ablations, by_family,
)  # fmt: skip


def _score(runs: dict[int, Scores]) -> Any:
    return score_of(list(runs.values())) if runs else UNKNOWN


def _gain(runs: dict[int, Scores], others: dict[int, Scores]) -> Any:
    """Of the seeds that both sides have."""
    both = [seed for seed in runs if seed in others]
    if not both:
        return UNKNOWN
    return gain_of([runs[seed] for seed in both], [others[seed] for seed in both])


def _families(runs: dict[int, Scores], results: Results) -> list[str]:
    if not runs:
        return [UNKNOWN] * len(results.families)
    return [f"{100 * value:.0f}" for value in pooled(list(runs.values())).families.values()]
