"""The result of a ranking: rows by budget and score, as a table for the terminal, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tpcompress.evaluation.scoring.metrics import Unit, find_metric
from tpcompress.evaluation.scoring.stats import Gain
from tpcompress.evaluation.tables import UNKNOWN, Table, markdown, rich_table, to_json
from tpcompress.files import write_atomic
from tpcompress.insertion.plan import PruningPlan

HEADER = ["rule@layer", "score", "to dense [95 %]", "tokens", "time", "FLOPs", "served"]

LATE = 2.0
"""How many times the layer average of the earliest rule the best rule may have."""


@dataclass(frozen=True)
class RankRow:
    """One rule at one budget.

    Attributes:
        rule: name of the pruner.
        layer: first decoder layer that sees fewer tokens.
        budget: label of the budget.
        plan: plan of the row, for training or export.
        score, ci95: score, and half width of its 95 % interval over rows.
        gain: score minus the dense model's on the same rows, with a paired interval.
        vision_tokens, retained_tokens: vision tokens of a prompt before and after pruning, mean over prompts.
        cost: cost relative to dense: `time`, `time_low`, `time_high`, `flops`; None if it could not be measured.
        served: a serving engine can run it on this model.
        layer_average: vision tokens averaged over the decoder layers, which a late stage lowers by little.
    """

    rule: str
    layer: int
    budget: str
    plan: PruningPlan
    score: float
    ci95: float
    gain: Gain
    vision_tokens: float | None = None
    retained_tokens: float | None = None
    cost: Mapping[str, Any] | None = None
    served: bool = False
    layer_average: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("plan", "gain")}
        return plain | {"plan": self.plan.to_dict(), "gain": list(self.gain)}


@dataclass(frozen=True)
class Ranking:
    """All rows, best first at each budget, and the rules that do not run.

    Attributes:
        rows: one per rule and budget that ran.
        refused: rules that do not run on this model or these rows, each with its reason.
        budgets: labels, in the order in which they were given.
        base: base model.
        data: description of the rows.
        metric: name of the metric.
        dense, dense_ci95: score of the base.
        blind: score of the base on blank images.
        num_images: rows of the scores.
        learnt: question families that scores average, because the image matters to the base there; None for all.
        measured_on: device of the times.
        folder: output folder.
        counted: how many questions count in the metric, as a sentence; empty if all do.
    """

    rows: Sequence[RankRow]
    refused: Sequence[Any]
    budgets: Sequence[str]
    base: str
    data: str
    metric: str
    dense: float
    dense_ci95: float
    blind: float
    num_images: int
    learnt: Sequence[str] | None
    measured_on: str
    folder: Path
    counted: str = ""

    def __post_init__(self) -> None:
        order = {label: number for number, label in enumerate(self.budgets)}
        ranked = sorted(self.rows, key=lambda row: (order[row.budget], *_merit(row)))
        object.__setattr__(self, "rows", ranked)

    @property
    def unit(self) -> Unit:
        """How scores are written."""
        return find_metric(self.metric).unit

    def at(self, budget: float | str) -> list[RankRow]:
        """Rows of one budget, best first.

        Raises:
            ValueError: no such budget.
        """
        if str(budget) not in self.budgets:
            raise ValueError(f"No budget {budget} in this ranking; it has {', '.join(self.budgets)}.")
        return [row for row in self.rows if row.budget == str(budget)]

    def best(self, budget: float | str, served: bool = False) -> RankRow:
        """The rule with the highest score at a budget; of equal scores, the one with fewer FLOPs.

        A rule that acts so late that the layers see more than `LATE` times the tokens of the earliest rule is passed
        over: it scores like the dense model because it hardly prunes.

        Args:
            budget: as it was given.
            served: only rules that a serving engine can run.

        Raises:
            ValueError: no such budget, or no rule ran at it.
        """
        found = [row for row in self.at(budget) if row.served or not served]
        if not found:
            what = "rule that can be served" if served else "rule"
            raise ValueError(f"No {what} ran at budget {budget}; {'; '.join(map(str, self.refused[:2]))}.")
        return next(row for row in found if not _is_late(row, found))

    @property
    def table(self) -> Table:
        """The table, with a section per budget."""
        unit = self.unit
        score = f"{unit.number(self.dense)} ±{unit.number(self.dense_ci95)}"
        sections = [[["dense", score, "", self._tokens, "1", "1", ""]]]
        for label in self.budgets:
            heading = [f"budget {label}", *[""] * (len(HEADER) - 1)]
            sections.append([heading, *map(self._line, self.at(label))])
        title = f"{find_metric(self.metric).title} ({unit.title}) of {self.base} on {self.num_images} rows"
        return Table(title, HEADER, sections, self.note, "rank")

    @property
    def note(self) -> str:
        """What the columns are, and what the scores average."""
        lines = [
            "tokens: vision tokens of a prompt after the last stage, mean. time: whole prefill (vision tower, "
            f"selection, language model) relative to dense, median of interleaved rounds on {self.measured_on}. "
            "FLOPs: decoder layers by formula, relative to dense, without the selection. served: a serving "
            "engine can run it."
        ]
        lines += [self.counted] if self.counted else []
        blind = self.unit.text(self.blind)
        if self.learnt:
            lines.append(f"Scores average the families in which the image matters: {', '.join(self.learnt)}.")
        else:
            lines.append(
                f"On blank images the base scores {blind}: no question family shows that it needs the image, so these "
                f"rows say little about pruning."
            )
        late = {
            f"{row.rule}@{row.layer}"
            for budget in self.budgets
            for row in self.at(budget)
            if _is_late(row, self.at(budget))
        }
        if late:
            lines.append(
                f"{', '.join(sorted(late))}: the layers see more than {LATE:g} times the tokens of the earliest rule, "
                f"so it is not chosen."
            )
        count = len({row.rule for row in self.rows})
        if count > 1:
            lines.append(
                f"The best of {count} rules is chosen on these rows, so its score is optimistic; test it on others."
            )
        return " ".join(lines)

    @property
    def refusals(self) -> list[str]:
        """One line per rule that is not in the table; equal reasons at several budgets are joined."""
        found: dict[tuple[str, str], list[str]] = {}
        for each in self.refused:
            found.setdefault((each.rule, each.reason), []).extend([] if each.budget is None else [each.budget])
        return [
            f"{rule}{' at ' + ', '.join(at) if at else ''}: {reason.rstrip('.')}."
            for (rule, reason), at in found.items()
        ]

    def print(self, console: Console) -> None:
        """Print the table and the rules that are not in it."""
        console.print(rich_table(self.table))
        if self.refused:
            console.print("Not in the table:", highlight=False)
            for line in self.refusals:
                console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("rows", "refused", "folder")}
        return plain | {"rows": [row.to_dict() for row in self.rows], "refused": self.refusals}

    @property
    def _tokens(self) -> str:
        known = [row.vision_tokens for row in self.rows if row.vision_tokens is not None]
        return f"{known[0]:.0f}" if known else UNKNOWN

    def _line(self, row: RankRow) -> list[str]:
        unit, cost = self.unit, row.cost or {}
        gain = f"{unit.change(row.gain.delta)} [{unit.change(row.gain.low)}, {unit.change(row.gain.high)}]"
        flops = cost.get("flops")
        return [
            f"{row.rule}@{row.layer}", f"{unit.number(row.score)} ±{unit.number(row.ci95)}", gain,
            UNKNOWN if row.retained_tokens is None else f"{row.retained_tokens:.0f}",
            f"{cost['time']:.2f}" if cost else UNKNOWN, UNKNOWN if flops is None else f"{flops:.2f}",
            "yes" if row.served else "",
        ]  # fmt: skip


def write_ranking(ranking: Ranking, folder: Path) -> None:
    """Write rank.json and rank.md."""
    write_atomic(folder / "rank.json", to_json(ranking.to_dict()))
    lines = markdown(ranking.table, level=1)
    if ranking.refused:
        lines += ["Not in the table:", "", *(f"- {line}" for line in ranking.refusals), ""]
    if (folder / "retained.png").is_file():
        lines += ["![retained tokens](retained.png)", ""]
    write_atomic(folder / "rank.md", "\n".join(lines))


def _is_late(row: RankRow, rows: Sequence[RankRow]) -> bool:
    """Whether the layers see more than `LATE` times as many vision tokens as with the earliest of some rules."""
    averages = [each.layer_average for each in rows if each.layer_average is not None]
    return row.layer_average is not None and row.layer_average > LATE * min(averages)


def _merit(row: RankRow) -> tuple[float, float, str]:
    """Order within a budget: score, then FLOPs, then name."""
    flops = (row.cost or {}).get("flops")
    return (-row.score if row.score == row.score else float("inf"), 1.0 if flops is None else flops, row.rule)
