"""The table of a comparison: which cells each row has, for the terminal and for Markdown alike."""

from __future__ import annotations

from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.scoring.metrics import Unit
from tpcompress.evaluation.scoring.stats import Gain
from tpcompress.evaluation.tables import UNKNOWN, Table

NAMES = {
    "dense": "dense",
    "downsample": "smaller image",
    "dense_ft": "dense, same steps",
    "training_free": "training-free",
    "training_aware": "training-aware",
}
"""Name of each arm in the table."""


def layout(report: Report, families: bool = True, only_families: bool = False) -> Table:
    """The table of a report.

    Args:
        report: the report.
        families: add a column for every family.
        only_families: leave out all other columns but the names of the rows.
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
            # A heading for the arm. Its unpruned rows, which have the name of the arm, stand above it.
            bare = sum(row.pruner is None for row in rows)
            heading = "same steps, pruned" if arm == "dense_ft" else NAMES[arm]
            section.insert(bare, [heading] + [""] * (len(header) - 1))
        if arm == "dense" and report.meta.get("blind"):
            section.append(_blind_cells(report, shown, only_families))
        sections += [section] if section else []
    title = f"{report.metric.title} in {report.metric.unit.title}"
    return Table(title, header, sections, "" if only_families else _caption(report, families))


def position_table(report: Report) -> Table | None:
    """How evenly the tokens of pruned rows lie over the image; None if no row has the numbers."""
    rows = [row for row in report.rows if row.uniformity is not None]
    if not rows:
        return None
    cells = []
    for row in rows:
        places = _index(row.uniformity, row.uniformity_ci95)
        thirds = _index(row.uniformity_thirds, row.uniformity_thirds_ci95)
        cells.append([f"{NAMES[row.arm]} {label(report, row)}", tokens(row.retained_tokens), places, thirds])
    note = (
        "Uniformity of the retained tokens over single positions and over 3 x 3 parts of the image: 1 if every one is "
        "kept equally often, 0 if always the same ones are. ±: 95 % interval over images."
    )
    return Table("Where retained tokens lie", ["model", "tokens", "positions", "thirds"], [cells], note)


def label(report: Report, row: Row) -> str:
    """Pruner, or the name of the arm without one; layer and seed where they tell rows apart."""
    several = sum(other.recipe == row.recipe for other in report.arm(row.arm)) > 1
    seed = f" (seed {row.seed})" if several else ""
    if row.pruner is None:
        return NAMES[row.arm] + seed
    return f"· {row.pruner}" + (f" @ layer {row.layer}" if row.layer else "") + seed


def tokens(value: float | None) -> str:
    """A number of tokens, without decimals where it is whole."""
    return UNKNOWN if value is None else f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def verdict(gain: Gain, unit: Unit) -> str:
    """A gain if it is outside its interval: `+6.1`, `worse -3.1`, `n.s.`."""
    points = unit.change(gain.delta)
    return points if gain.helps else f"worse {points}" if gain.hurts else "n.s."


def _index(value: float | None, ci95: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}" + (f" ±{ci95:.2f}" if ci95 is not None else "")


def _cells(report: Report, row: Row, shown: list[str], only_families: bool) -> list[str]:
    unit, cells = report.metric.unit, [label(report, row)]
    if only_families and row.keep_tokens is not None:
        cells[0] += f", {row.keep_tokens:g}"
    if not only_families:
        empty = UNKNOWN if row.arm == "training_aware" else ""
        gains = [report.gain(row), report.control_gain(row)] if row.arm == "training_aware" else [None, None]
        score = unit.number(row.score) + (f" ±{unit.number(row.ci95)}" if row.ci95 is not None else "")
        cells += [_tokens(row), score, *(empty if gain is None else verdict(gain, unit) for gain in gains)]
    return cells + [unit.number(row.families.get(name)) for name in shown]


def _blind_cells(report: Report, shown: list[str], only_families: bool) -> list[str]:
    unit = report.metric.unit
    cells = ["blind"] + ([] if only_families else ["", unit.number(report.blind_score), "", ""])
    return cells + [unit.number(report.meta["blind"].get(name)) for name in shown]


def _tokens(row: Row) -> str:
    if row.keep_tokens is None:
        return tokens(row.retained_tokens)
    return " / ".join([f"{row.keep_tokens:g}", tokens(row.retained_tokens), tokens(row.layer_average)])


def _sorted(rows: list[Row]) -> list[Row]:
    """Unpruned first, then large budgets, then the better score."""
    return sorted(
        rows,
        key=lambda row: (row.pruner is not None, -(row.retained_tokens or row.keep_tokens or 0), -(row.score or 0)),
    )


def _caption(report: Report, families: bool) -> str:
    sentences = ["tokens: nominal / retained / mean of the decoder layers, per image.", "±: 95 % interval over images."]
    if report.arm("training_aware"):
        sentences.append("vs free: against the same pruner without training; vs control: against the same extra steps")
        sentences[-1] += " without the pruner, then pruned; n.s.: inside the 95 % interval."
    if report.arm("downsample"):
        sentences.append("smaller image: the dense base on images of fewer pixels.")
    if report.meta.get("blind"):
        sentences.append("blind: the dense base on blanked images.")
    if families and set(report.families) - set(report.learnt):
        sentences.append("*: not learnt by the dense base, not in the score.")
    return " ".join(sentences)
