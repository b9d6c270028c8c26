"""The report of an estimator table as data: a line per estimator and setting, marks, and findings in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tpcompress.evaluation.scoring.metrics import PERCENT, Unit
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.seeds import pooled
from tpcompress.evaluation.scoring.stats import Gain
from tpcompress.lab.estimators.catalogue import find_estimator
from tpcompress.lab.estimators.cells import BASE, DENSE, FREE, TOY
from tpcompress.lab.estimators.toy_run import ENOUGH
from tpcompress.training.diagnostics.estimator_results import DOES_NOT_LEARN, LEARNS

Record = Mapping[str, Any]
Group = tuple[str, str, str, int]
"""Table, row, column and tokens: equal in cells that differ in their seed alone."""


@dataclass(frozen=True)
class Line:
    """One estimator or pruner in one setting of a table.

    Attributes:
        table: retrieval (the toy task), free or base.
        row: estimator or pruner.
        column: scorer; empty where there is none.
        keep: tokens per image in the test; 0 in the toy task.
        step: training step of the test, in the toy task.
        seeds: number of runs or draws that the numbers are means of.
        score: toy task: share of right answers; base: mean of the learnt families.
        ci95: half width of its interval over images, on the base.
        recall: share of the facts that were retained, in the toy task.
        worst: lowest score of a seed.
        over_free: (delta, low, high) against the best pruner without training that selects, on the same images.
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
    """All results of an estimator table.

    Attributes:
        records: labels and results of the cells, in their order.
        answers: the answers behind each cell on the base, by its name, averaged over the learnt families.
        meta: settings of the table.
        unit: unit of the scores on the base.
    """

    records: Sequence[Record]
    answers: Mapping[str, Scores]
    meta: dict[str, Any] = field(default_factory=dict)
    unit: Unit = PERCENT

    @cached_property
    def groups(self) -> dict[Group, list[Record]]:
        """Records that differ in their seed alone."""
        groups: dict[Group, list[Record]] = {}
        for record in self.records:
            key = (record["table"], record["row"], record["column"], record["keep"])
            groups.setdefault(key, []).append(record)
        return groups

    @cached_property
    def lines(self) -> list[Line]:
        """Every line of all tables."""
        return [*self._on_toy(), *self._on_base()]

    @cached_property
    def by_place(self) -> dict[tuple[Any, ...], Line]:
        """Lines by table, row, column, tokens and step."""
        return {(x.table, x.row, x.column, x.keep, x.step): x for x in self.lines}

    def of(self, table: str) -> list[Line]:
        """The lines of a table."""
        return [line for line in self.lines if line.table == table]

    def _on_toy(self) -> Iterator[Line]:
        for (table, row, *_), group in self.groups.items():
            for looks in zip(*(record["looks"] for record in group), strict=True) if table == TOY else ():
                accuracy = [look["accuracy"] for look in looks]
                recall = sum(look["recall"] for look in looks) / len(looks)
                mean, step = sum(accuracy) / len(accuracy), looks[0]["step"]
                yield Line(TOY, row, step=step, seeds=len(looks), score=mean, recall=recall, worst=min(accuracy))

    def _on_base(self) -> Iterator[Line]:
        groups = {key: group for key, group in self.groups.items() if key[0] != TOY}
        seeds = {key: [self.answers[record["name"]] for record in group] for key, group in groups.items()}
        means = {key: pooled(several) for key, several in seeds.items()}
        dense = means.get((FREE, DENSE, "", 0))
        for key, scores in means.items():
            table, row, column, keep = key
            rules = [means[k] for k, group in groups.items() if k[3] == keep and group[0].get("selects")]
            best = max(rules, key=lambda rule: rule.score, default=None)
            yield Line(
                table, row, column, keep, seeds=len(seeds[key]), score=scores.score, ci95=scores.ci95,
                worst=min(each.score for each in seeds[key]),
                over_free=scores.difference(best) if best is not None and table == BASE else None,
                under_dense=scores.difference(dense) if dense is not None and row != DENSE else None,
            )  # fmt: skip

    def marks(self) -> list[dict[str, Any]]:
        """The result of each estimator on the toy task, as `training.diagnostics.estimator_results` keeps it."""
        entries = []
        for (table, row, *_), group in self.groups.items():
            if table != TOY:
                continue
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

    # ------------------------------------------------------------------ findings

    def findings(self) -> list[str]:
        """Which estimators train a scorer and which do not, in sentences."""
        marks, sentences = self.marks(), []
        if marks:
            bad = [entry["estimator"] for entry in marks if entry["mark"] != LEARNS]
            share = round(100 * ENOUGH)
            text = f"{len(marks) - len(bad)} of {len(marks)} estimators train a scorer from scratch in "
            text += f"{marks[0]['steps']} steps ({share} % of answers right, {share} % of facts retained, every seed)"
            sentences.append(f"{text}; not: {', '.join(bad)}." if bad else f"{text}.")
        for keep in dict.fromkeys(line.keep for line in self.of(BASE)):
            sentences += self._on_budget(keep)
        return sentences

    def _on_budget(self, keep: int) -> Iterator[str]:
        free = sorted((line for line in self.of(FREE) if line.keep == keep), key=lambda line: -line.score)
        if free:
            ranked = ", ".join(f"{line.row} {self.unit.number(line.score)}" for line in free)
            yield f"Without training, at {keep} tokens: {ranked}."
        for column in dict.fromkeys(line.column for line in self.of(BASE)):
            best = max((x for x in self.of(BASE) if (x.keep, x.column) == (keep, column)), key=lambda x: x.score)
            text = f"Scorer {column}, at {keep} tokens: best on this base is {best.row} with "
            text += self.unit.text(best.score)
            for what, gain in (("the best pruner that selects", best.over_free), ("dense", best.under_dense)):
                if gain is not None:
                    delta, low, high = map(self.unit.change, Gain(*gain))
                    text += f", {delta} [{low}, {high}] against {what}"
            yield f"{text}."
