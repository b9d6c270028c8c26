"""The two tables of estimators, what they say in words, and the files made of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.seeds import pooled
from tpcompress.files import write_atomic
from tpcompress.lab.estimators.catalogue import Estimator, find_estimator
from tpcompress.lab.estimators.toy_run import ENOUGH
from tpcompress.training.diagnostics.estimator_results import DOES_NOT_LEARN, LEARNS

Record = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One estimator or rule in one setting of a table.

    Attributes:
        table: retrieval, free or base.
        row: estimator or rule.
        column: scorer; empty where there is none.
        keep: tokens per image in the test; 0 in the retrieval task.
        step: of the look, in the retrieval task.
        seeds: how many runs or draws the numbers are means of.
        score: retrieval: share of right answers; base: mean accuracy of the learnt families.
        ci95: half width of its interval over images, on the base.
        recall: share of the facts that were retained, in the retrieval task.
        worst: the lowest score of a seed.
        over_free: (delta, low, high) against the best rule without training that selects, on the same images.
        under_dense: the same against the base with all tokens.
    """

    table: str
    row: str
    column: str = ""
    keep: int = 0
    step: int = 0
    seeds: int = 1
    score: float = 0.0
    ci95: float | None = None
    recall: float | None = None
    worst: float | None = None
    over_free: tuple[float, float, float] | None = None
    under_dense: tuple[float, float, float] | None = None


@dataclass
class EstimatorReport:
    """All that was measured.

    Attributes:
        records: of the cells, in their order.
        load: the answers behind a cell on the base, by its name.
        meta: how it was measured.
    """

    records: list[Record]
    load: Callable[[str], Scores]
    meta: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ lines

    @cached_property
    def lines(self) -> list[Line]:
        """Every line of both tables."""
        return [*self._retrieval(), *self._base()]

    def _retrieval(self) -> Iterator[Line]:
        for (row, *_), group in _grouped(r for r in self.records if r["table"] == "retrieval").items():
            for number, look in enumerate(group[0]["looks"]):
                found = [record["looks"][number] for record in group]
                accuracy = [one["accuracy"] for one in found]
                recall = sum(one["recall"] for one in found) / len(found)
                mean = sum(accuracy) / len(accuracy)
                yield Line(
                    "retrieval",
                    row,
                    step=look["step"],
                    seeds=len(found),
                    score=mean,
                    recall=recall,
                    worst=min(accuracy),
                )

    def _base(self) -> Iterator[Line]:
        groups = _grouped(r for r in self.records if r["table"] != "retrieval")
        answers = {key: pooled([self.load(r["name"]) for r in group]) for key, group in groups.items()}
        dense = next((scores for (row, *_), scores in answers.items() if row == "dense"), None)
        for key, group in groups.items():
            row, column, keep = key
            scores, best = answers[key], self._best_rule(groups, answers, keep)
            each = [record["score"] for record in group]
            yield Line(
                group[0]["table"], row, column, keep, seeds=len(group), score=scores.score, ci95=scores.ci95,
                worst=min(each),
                over_free=scores.difference(best) if best is not None and group[0]["table"] == "base" else None,
                under_dense=scores.difference(dense) if dense is not None and row != "dense" else None,
            )  # fmt: skip

    def _best_rule(self, groups: dict, answers: dict, keep: int) -> Scores | None:
        rules = [answers[key] for key, group in groups.items() if key[2] == keep and group[0].get("selects")]
        return max(rules, key=lambda scores: scores.score, default=None)

    def marks(self) -> list[Record]:
        """What the retrieval task says of each estimator, as `training.marks` keeps it."""
        entries = []
        for (row, *_), group in _grouped(r for r in self.records if r["table"] == "retrieval").items():
            estimator, last = find_estimator(row), [record["looks"][-1] for record in group]
            entries.append(
                {
                    "selector": estimator.selector["type"],
                    "applier": estimator.applier["type"],
                    "training": estimator.training,
                    "mark": LEARNS if all(one["enough"] for one in last) else DOES_NOT_LEARN,
                    "estimator": row,
                    "accuracy": [round(one["accuracy"], 3) for one in last],
                    "recall": [round(one["recall"], 3) for one in last],
                    "steps": last[0]["step"],
                }
            )
        return entries

    # ------------------------------------------------------------------ words

    def findings(self) -> list[str]:
        """What helps and what does not, in sentences."""
        marks, sentences = self.marks(), []
        if marks:
            bad = [entry["estimator"] for entry in marks if entry["mark"] != LEARNS]
            steps, share = marks[0]["steps"], round(100 * ENOUGH)
            text = (
                f"{len(marks) - len(bad)} of {len(marks)} estimators teach a scorer without knowledge in {steps} steps"
            )
            text += f" ({share} % right and {share} % of the facts, every seed)"
            sentences.append(f"{text}; not: {', '.join(bad)}." if bad else f"{text}.")
        for keep in dict.fromkeys(line.keep for line in self.lines if line.table == "base"):
            sentences += self._on_budget(keep)
        return sentences

    def _on_budget(self, keep: int) -> Iterator[str]:
        free = [line for line in self.lines if line.table == "free" and line.keep == keep]
        if free:
            ranked = sorted(free, key=lambda line: -line.score)
            yield (
                f"Without training, at {keep} tokens: "
                + ", ".join(f"{x.row} {_percent(x.score)}" for x in ranked)
                + "."
            )
        for column in dict.fromkeys(line.column for line in self.lines if line.table == "base"):
            lines = [x for x in self.lines if x.table == "base" and (x.keep, x.column) == (keep, column)]
            best = max(lines, key=lambda line: line.score)
            text = f"Scorer {column}, at {keep} tokens: best is {best.row} with {_percent(best.score)} %"
            for what, gain in (("the best rule that selects", best.over_free), ("dense", best.under_dense)):
                text += "" if gain is None else f", {_points(gain)} against {what}"
            yield f"{text}."

    # ------------------------------------------------------------------ files

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each table, as text."""
        made = []
        looks = dict.fromkeys(line.step for line in self.lines if line.table == "retrieval")
        if looks:
            header = ["estimator", "selector", "applier", "training", "losses"]
            header += [f"{what} @{step}" for step in looks for what in ("right", "recall")] + ["worst", "mark"]
            made.append(("Retrieval task, percent", header, [*self._task_rows(list(looks))]))
        columns = dict.fromkeys((line.column, line.keep) for line in self.lines if line.table == "base")
        if columns:
            header = ["estimator", *(f"{column} @{keep}" for column, keep in columns)]
            made.append(("On the base, scorer alone, percent", header, [*self._base_rows(list(columns))]))
        keeps = dict.fromkeys(line.keep for line in self.lines if line.table == "free" and line.keep)
        if keeps:
            rules = dict.fromkeys(line.row for line in self.lines if line.table == "free")
            rows = [[rule, *(self._cell("free", rule, "", keep) for keep in keeps)] for rule in rules]
            made.append(("Without training, percent", ["rule", *(f"@{keep}" for keep in keeps)], rows))
        return made

    def _task_rows(self, looks: Sequence[int]) -> Iterator[list[str]]:
        for entry in self.marks():
            estimator: Estimator = find_estimator(entry["estimator"])
            named = [_short(estimator.selector), _short(estimator.applier), estimator.training]
            losses = ", ".join(config["class_path"] for config in estimator.losses) or "–"
            lines = {x.step: x for x in self.lines if x.table == "retrieval" and x.row == estimator.name}
            values = [_percent(value) for step in looks for value in (lines[step].score, lines[step].recall)]
            yield [estimator.name, *named, losses, *values, _percent(lines[looks[-1]].worst), entry["mark"]]

    def _base_rows(self, columns: Sequence[tuple[str, int]]) -> Iterator[list[str]]:
        for row in dict.fromkeys(line.row for line in self.lines if line.table == "base"):
            yield [row, *(self._cell("base", row, column, keep) for column, keep in columns)]

    def _cell(self, table: str, row: str, column: str, keep: int) -> str:
        keep = 0 if row == "dense" else keep
        wanted = (table, row, column, keep)
        line = next((x for x in self.lines if (x.table, x.row, x.column, x.keep) == wanted), None)
        return "–" if line is None else f"{_percent(line.score)} ± {_percent(line.ci95)}"

    def print(self, console: Console) -> None:
        """Tables and findings."""
        for title, header, rows in self.tables():
            table = Table(*header, title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for sentence in self.findings():
            console.print(f"· {sentence}", markup=False, highlight=False)

    def to_markdown(self) -> str:
        """Tables, findings and how they were made."""
        lines = ["# Estimators", ""]
        for title, header, rows in self.tables():
            lines += [f"## {title}", "", "| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        lines += [
            "Retrieval: means over seeds, `worst` is the lowest share of a seed. Base: means over seeds, ± is the"
        ]
        lines += ["95 % interval over images, all questions of an image together.", "", "## Findings", ""]
        lines += [f"- {sentence}" for sentence in self.findings()] + ["", "## How", ""]
        return "\n".join([*lines, *(f"- {key}: {value}" for key, value in self.meta.items())]) + "\n"

    def write(self, folder: Path) -> None:
        """Write report.json, report.csv and report.md; a reader never sees half a file."""
        plain = [vars(line) for line in self.lines]
        values = {"lines": plain, "marks": self.marks(), "findings": self.findings(), "meta": self.meta}
        write_atomic(folder / "report.json", json.dumps(values, indent=2))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(vars(Line("", ""))), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in x.items()} for x in plain)
        write_atomic(folder / "report.csv", text.getvalue())
        write_atomic(folder / "report.md", self.to_markdown())


def _grouped(records: Iterator[Record]) -> dict[tuple[str, str, int], list[Record]]:
    """Records that differ in their seed alone."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["row"], record["column"], record["keep"]), []).append(record)
    return groups


def _short(config: Any) -> str:
    arguments = [str(value) for key, value in config.items() if key != "type"]
    return " ".join([config["type"], *arguments])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _points(gain: tuple[float, float, float]) -> str:
    delta, low, high = (100 * value for value in gain)
    return f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]"
