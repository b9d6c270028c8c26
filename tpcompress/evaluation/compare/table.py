"""How the rows of a report are laid out as text, for the terminal and for Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpcompress.evaluation.compare.row import Row

if TYPE_CHECKING:
    from tpcompress.evaluation.compare.report import Report

UNKNOWN = "–"
NAMES = {
    "dense": "dense",
    "downsample": "smaller picture",
    "dense_ft": "dense, same steps",
    "training_free": "training-free",
    "training_aware": "training-aware",
}


@dataclass(frozen=True)
class Cells:
    """A table of strings; `sections` are the rows of each arm."""

    title: str
    header: list[str]
    sections: list[list[list[str]]]
    caption: str


def layout(report: Report, families: bool = True, only_families: bool = False) -> Cells:
    """Lay out a report.

    Args:
        report: its rows.
        families: a column for every family.
        only_families: no other columns but the names of the rows.
    """
    shown = report.families if families else []
    learnt = set(report.learnt)
    header = ["model"] + ([] if only_families else ["tokens", "score", "vs free", "vs control"])
    header += [name if name in learnt else f"{name}*" for name in shown]
    sections = []
    for arm in NAMES:
        rows = _sorted(report.arm(arm))
        section = [_cells(report, row, shown, only_families) for row in rows]
        if any(row.pruner for row in rows):
            # A heading for the arm; its unpruned rows, which bear the arm's name, stand above it.
            bare = sum(row.pruner is None for row in rows)
            heading = "same steps, pruned" if arm == "dense_ft" else NAMES[arm]
            section.insert(bare, [heading] + [""] * (len(header) - 1))
        if arm == "dense" and report.meta.get("blind"):
            section.append(_blind_cells(report, shown, only_families))
        sections += [section] if section else []
    return Cells("Accuracy in percent", header, sections, "" if only_families else _caption(report, families))


def percent(value: float | None) -> str:
    """A share as percent with one decimal."""
    return UNKNOWN if value is None else f"{100 * value:.1f}"


def index(value: float | None, ci95: float | None) -> str:
    """A number in [0, 1] with two decimals, and its interval."""
    return UNKNOWN if value is None else f"{value:.2f}" + (f" ±{ci95:.2f}" if ci95 is not None else "")


def label(report: Report, row: Row) -> str:
    """Pruner, or what the model is without one; layer and seed where they tell rows apart."""
    if row.pruner is None:
        return NAMES[row.arm] + (f" (seed {row.seed})" if _several_seeds(report, row) else "")
    layer = f" @ layer {row.layer}" if row.layer else ""
    return f"· {row.pruner}{layer}" + (f" (seed {row.seed})" if _several_seeds(report, row) else "")


def tokens(value: float | None) -> str:
    """A number of tokens, without decimals where it is whole."""
    return UNKNOWN if value is None else f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _cells(report: Report, row: Row, shown: list[str], only_families: bool) -> list[str]:
    cells = [label(report, row)]
    if only_families and row.keep_tokens is not None:
        cells[0] += f", {_budget(row)}"
    if not only_families:
        aware = row.arm == "training_aware"
        gain, control = (report.gain(row), report.control_gain(row)) if aware else (None, None)
        empty = UNKNOWN if aware else ""
        cells += [_tokens(row), _score(row), str(gain or empty), str(control or empty)]
    return cells + [percent(row.families.get(name)) for name in shown]


def _blind_cells(report: Report, shown: list[str], only_families: bool) -> list[str]:
    cells = ["blind"] + ([] if only_families else ["", percent(report.blind_score), "", ""])
    return cells + [percent(report.meta["blind"].get(name)) for name in shown]


def _tokens(row: Row) -> str:
    if row.keep_tokens is None:
        return tokens(row.retained_tokens)
    return " / ".join([_budget(row), tokens(row.retained_tokens), tokens(row.layer_average)])


def _budget(row: Row) -> str:
    return f"{row.keep_tokens:g}" if row.keep_tokens is not None else UNKNOWN


def _score(row: Row) -> str:
    return percent(row.score) + (f" ±{percent(row.ci95)}" if row.ci95 is not None else "")


def _sorted(rows: list[Row]) -> list[Row]:
    """Unpruned first, then large budgets, then the better score."""
    return sorted(
        rows,
        key=lambda row: (row.pruner is not None, -(row.retained_tokens or row.keep_tokens or 0), -(row.score or 0)),
    )


def _several_seeds(report: Report, row: Row) -> bool:
    return sum(other.recipe == row.recipe for other in report.arm(row.arm)) > 1


def _caption(report: Report, families: bool) -> str:
    sentences = ["tokens: nominal / retained / mean of the decoder layers, per image.", "±: 95 % interval over images."]
    if report.arm("training_aware"):
        sentences.append("vs free: against the same pruner without training; vs control: against the same extra steps")
        sentences[-1] += " without the pruner, then pruned; n.s.: inside the 95 % interval."
    if report.arm("downsample"):
        sentences.append("smaller picture: the dense base on pictures of fewer pixels.")
    if report.meta.get("blind"):
        sentences.append("blind: the dense base on blanked images.")
    if families and set(report.families) - set(report.learnt):
        sentences.append("*: not learnt by the dense base, not in the score.")
    return " ".join(sentences)
