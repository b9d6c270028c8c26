"""The table of a comparison: which cells each row has, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping

from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.scoring.metrics import Unit
from tpcompress.evaluation.scoring.stats import Gain
from tpcompress.evaluation.tables import UNKNOWN, Table
from tpcompress.insertion.budget import amount_text

NAMES = {
    "dense": "dense",
    "downsample": "smaller image",
    "oracle": "oracle",
    "dense_ft": "dense, same steps",
    "training_free": "training-free",
    "training_aware": "training-aware",
}
"""Name of each arm in the table."""
WAYS = {
    "dense": "", "downsample": "", "oracle": "", "dense_ft": ", control", "training_free": "",
    "training_aware": ", trained",
}  # fmt: skip
"""What is added to the name of a row where the arm has no heading."""


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


def tasks_table(reports: Mapping[str, Report]) -> Table:
    """The scores of all tasks beside each other, one row per model.

    Args:
        reports: report of each task, by its name.
    """
    rows = list({row.key: row for report in reports.values() for row in report.rows}.values())
    cells = []
    for row in sorted(rows, key=lambda row: list(NAMES).index(row.arm)):
        name = NAMES[row.arm] if row.pruner is None else f"{NAMES[row.arm]} {label(next(iter(reports.values())), row)}"
        budget = "" if row.keep_tokens is None else f", {amount_text(row.keep_tokens)}"
        line, kept = [name + budget], []
        for report in reports.values():
            found, dense = report.find(*row.key), next(iter(report.arm("dense")), None)
            score, unit = None if found is None else found.score, report.metric.unit
            interval = "" if found is None or found.ci95 is None else f" ±{unit.number(found.ci95)}"
            line.append(unit.number(score) + interval)
            if score is not None and dense is not None and dense.score is not None and min(score, dense.score) > 0:
                kept.append(score / dense.score)
        line.append(f"{100 * sum(kept) / len(kept):.1f}" if len(kept) == len(reports) else UNKNOWN)
        cells.append(line)
    header = [f"{name}{'' if report.learnt else '*'} ({report.metric.name})" for name, report in reports.items()]
    note = "±: 95 % interval over rows. % of dense: mean over the tasks of score / score of the dense base."
    if not all(report.learnt for report in reports.values()):
        note += " *: no family is learnt by the dense base."
    return Table("All tasks", ["model", *header, "% of dense"], [cells], note)


def beside_table(report: Report) -> Table | None:
    """Flips, calibration and the hard subset; None if no row has any of them."""
    rows = [row for row in report.rows if row.calibration_error is not None]
    if not rows:
        return None
    hard = report.meta.get("hard") or {}
    header = ["model", "flips", "lost", "gained", "changed", "ECE", "conf-acc"] + (["hard"] if hard else [])
    cells, unit = [], report.metric.unit
    for row in rows:
        name = label(report, row).removeprefix("· ") + WAYS[row.arm]
        line = [name if row.keep_tokens is None else f"{name}, {amount_text(row.keep_tokens)}"]
        line += [_share(row.flips, row.flips_ci95), _share(row.lost), _share(row.gained), _share(row.changed)]
        line += [_share(row.calibration_error, row.calibration_ci95), _share(row.overconfidence, sign=True)]
        cells.append([*line, *([_interval(unit, row.hard, row.hard_ci95)] if hard else [])])
    if hard:
        blurred = _interval(unit, hard.get("score"), hard.get("ci95"))
        cells.append(["dense, images without detail", *[UNKNOWN] * 6, blurred])
    note = (
        "In percent of the questions. flips: right in one of this model and the dense base and wrong in the other "
        "(lost: became wrong; gained: became right). changed: another answer. ECE: mean distance of confidence and "
        "accuracy over 15 bins. conf-acc: mean confidence minus accuracy."
    )
    if hard:
        note += (
            f" hard: {report.metric.title.lower()} on the {hard['questions']} questions that the dense base gets wrong "
            "on images without detail; each half is chosen by one way to remove it, and that base is scored under the "
            "other."
        )
    return Table("Beside the score", header, [cells], note)


def _interval(unit: Unit, value: float | None, ci95: float | None) -> str:
    return unit.number(value) + ("" if ci95 is None else f" ±{unit.number(ci95)}")


def _share(value: float | None, ci95: float | None = None, sign: bool = False) -> str:
    if value is None:
        return UNKNOWN
    return f"{100 * value:{'+' if sign else ''}.1f}" + ("" if ci95 is None else f" ±{100 * ci95:.1f}")


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
        cells[0] += f", {amount_text(row.keep_tokens)}"
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
    return " / ".join([f"{amount_text(row.keep_tokens)}", tokens(row.retained_tokens), tokens(row.layer_average)])


def _sorted(rows: list[Row]) -> list[Row]:
    """Unpruned first, then large budgets, then the better score."""
    return sorted(
        rows,
        key=lambda row: (row.pruner is not None, -(row.retained_tokens or row.keep_tokens or 0), -(row.score or 0)),
    )


def _caption(report: Report, families: bool) -> str:
    sentences = [
        "tokens: nominal per image / retained / mean of the decoder layers, both per question with an image.",
        "±: 95 % interval over rows.",
    ]
    if report.meta.get("counted"):
        sentences.append(report.meta["counted"])
    if report.arm("training_aware"):
        sentences.append("vs free: against the same pruner without training; vs control: against the same extra steps")
        sentences[-1] += " without the pruner, then pruned; n.s.: inside the 95 % interval."
    if report.arm("downsample"):
        sentences.append("smaller image: the dense base on images of fewer pixels.")
    for row in report.arm("oracle")[:1]:
        known = f"; {row.note}" if row.note else ""
        sentences.append(f"oracle: the tokens that each question rests on, and random others{known}.")
    if report.meta.get("blind"):
        sentences.append("blind: the dense base on blank images.")
    if families and set(report.families) - set(report.learnt):
        why = "not in the score" if report.learnt else "scores are means over all of them, which says little on pruning"
        sentences.append(f"*: not learnt by the dense base (not clearly better than blind); {why}.")
    return " ".join(sentences)
