"""The findings of a report in sentences, each computed from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row, difference
from tpcompress.evaluation.compare.table import tokens
from tpcompress.evaluation.scoring.metrics import Unit
from tpcompress.evaluation.scoring.stats import Gain

BASELINES = ("random", "uniform")
"""Pruners that every other pruner should beat."""


def findings(report: Report) -> list[str]:
    """Sentences on the base, on pruning without training, on training with the pruner, and on the export."""
    sentences = _on_dense(report)
    budgets = sorted({row.retained_tokens for row in report.rows if row.pruner and row.retained_tokens}, reverse=True)
    for budget in budgets:
        sentences += _on_training_free(report, budget)
    for smaller in report.arm("downsample"):
        sentences += _on_smaller_images(report, smaller)
    for group in _groups(report.arm("training_aware")):
        sentences += _on_training_aware(report, group)
    for budget in budgets:
        sentences += _on_ranking(report, budget)
    return [*dict.fromkeys(sentences), *_on_export(report)]


def _on_dense(report: Report) -> list[str]:
    unit, dense, sentences = report.metric.unit, _dense(report), []
    if dense is not None:
        blind = "" if report.blind_score is None else f"; with blank images {unit.text(report.blind_score)}"
        number = len(report.averaged)
        families = f"mean of {number} learnt families" if number != 1 else f"family {report.averaged[0]}"
        families = families if report.learnt else "mean of all families" if number != 1 else families
        sentences.append(f"The dense base scores {unit.text(dense.score)} ({families}){blind}.")
    if dense is not None and not report.learnt:
        sentences.append(
            "In no family is the dense base clearly better than with blank images, so these scores do not show what "
            "pruning costs: give more rows, questions that need the image, or a base that answers them."
        )
        return sentences
    rest = [name for name in report.families if name not in report.learnt]
    if rest:
        sentences.append(f"Not learnt by the base, so not in any score: {', '.join(rest)}.")
    for control in [row for row in report.arm("dense_ft") if row.pruner is None]:
        if dense is not None:
            change = _points(_difference(control, dense), unit)
            sentences.append(f"The same extra steps without a pruner change the dense score by {change}.")
    return sentences


def _on_training_free(report: Report, budget: float) -> list[str]:
    unit = report.metric.unit
    groups = sorted(_groups(_at(report, "training_free", budget)), key=lambda group: -_mean(group))
    if len(groups) < 2:
        return []
    best, dense = groups[0], _dense(report)
    text = f"On this base, at {tokens(budget)} tokens per question, {_name(best[0])} is the best pruner without "
    text += f"training: {unit.text(_mean(best))}"
    if dense is not None and dense.score is not None:
        text += f" ({unit.change(_mean(best) - dense.score)} against dense)"
    floor = max((group for group in groups if group[0].pruner in BASELINES), key=_mean, default=None)
    if floor is None:
        return [text + "."]
    others = [group for group in groups if group[0].pruner not in BASELINES]
    beaten = [group for group in others if not _difference(group[0], floor[0]).helps]
    if beaten:
        text += f"; not better than {_scored([floor], unit)}: {_scored(beaten, unit)}"
    elif others:
        text += f"; all others beat {_scored([floor], unit)}"
    return [text + "."]


def _on_smaller_images(report: Report, smaller: Row) -> list[str]:
    """Which pruners are not better than smaller images of the same budget."""
    if smaller.score is None:
        return [f"Smaller images are {smaller.note}"] if smaller.note else []
    unit = report.metric.unit
    text = (
        f"Smaller images of {tokens(smaller.retained_tokens)} tokens score {unit.text(smaller.score)} without a pruner"
    )
    groups = _groups([row for row in report.arm("training_free") if row.keep_tokens == smaller.keep_tokens])
    beaten = [group for group in groups if not _difference(group[0], smaller).helps]
    if beaten:
        text += f"; pruners that are not better without training: {_scored(beaten, unit)}"
    elif groups:
        text += "; every pruner is better without training"
    return [text + "."]


def _on_training_aware(report: Report, group: list[Row]) -> list[str]:
    unit, row, score = report.metric.unit, group[0], _mean(group)
    gains = [gain for r in group if (gain := report.gain(r)) is not None]
    text = f"{_name(row)} at {tokens(row.retained_tokens)} tokens, trained in the loop, reaches {unit.text(score)}"
    if gains:
        free = score - _mean_delta(gains)
        text += f" against {unit.text(free)} without training ({_verdict(gains, unit)}"
        text += f"{_recovered(report, free, gains)})"
    sentences = [f"{text}; {_control_clause(report, group, gains)}."]
    shift = _family_shift(report, group)
    sentences += [shift] if shift else []
    for name in BASELINES:
        rows = [r for r in _at(report, "training_free", row.retained_tokens) if r.pruner == name]
        if rows and row.pruner != name and _mean(rows) > score:
            sentences.append(
                f"ALARM: {_name(row)} trained at {tokens(row.retained_tokens)} tokens is below untrained {name} "
                f"({unit.text(_mean(rows))})."
            )
    return sentences


def _control_clause(report: Report, group: list[Row], gains: list[Gain]) -> str:
    unit, controls = report.metric.unit, [gain for row in group if (gain := report.control_gain(row)) is not None]
    if not controls:
        return "without a control, the extra training alone is not ruled out as the cause"
    reached = unit.text(_mean(group) - _mean_delta(controls))
    text, said = f"the same steps without the pruner, then pruned, reach {reached}", _verdict(controls, unit)
    if all(gain.helps for gain in controls):
        return f"{text}, so the gain comes from the pruner in the loop ({said})"
    if any(gain.helps for gain in controls):
        return f"{text} ({said})"
    if any(gain.hurts for gain in controls):
        return f"{text}, which is better: the pruner in the loop did harm ({said})"
    if gains and all(gain.helps for gain in gains):
        return f"{text}, so the gain comes from the extra steps, not from the pruner in the loop"
    return f"{text}, which is not clearly different"


def _on_ranking(report: Report, budget: float) -> list[str]:
    """Whether training changes which pruner is best."""
    unit, free, aware = report.metric.unit, *(_at(report, arm, budget) for arm in ("training_free", "training_aware"))
    if not free or not aware:
        return []
    best_free, best_aware = (max(_groups(rows), key=_mean)[0] for rows in (free, aware))
    gain = _difference(best_aware, best_free)
    text = f"At {tokens(budget)} tokens the best trained model ({_name(best_aware)}, {unit.text(best_aware.score)})"
    against = f"the best untrained one ({_name(best_free)}, {unit.text(best_free.score)})"
    if gain.helps:
        text += f" beats {against} by {unit.number(gain.delta)}"
    elif gain.hurts:
        text += f" is {unit.number(-gain.delta)} below {against}"
    else:
        text += f" is not clearly different from {against}"
    rank = list(dict.fromkeys(row.pruner for row in sorted(free, key=lambda row: -(row.score or 0))))
    if best_aware.pruner in rank and best_aware.pruner != best_free.pruner and gain.helps:
        place = rank.index(best_aware.pruner) + 1
        text += f"; {_name(best_aware)} is number {place} of {len(rank)} without training"
    return [text + "."]


def _on_export(report: Report) -> list[str]:
    if not report.export:
        return []
    if report.export.get("verified"):
        return [f"The export in {report.export.get('dir')} was loaded again and agrees with the trained model."]
    return [f"The export in {report.export.get('dir')} is NOT verified."]


# ---------------------------------------------------------------------------------------------------- parts


def _family_shift(report: Report, group: list[Row]) -> str | None:
    """The families that training moved most and least, which the mean hides."""
    pairs = [(row, twin) for row in group if (twin := report.twin(row, "training_free")) is not None]
    deltas = []
    for name in report.averaged:
        known = [(r.families.get(name), t.families.get(name)) for r, t in pairs]
        both = [a - b for a, b in known if a is not None and b is not None]
        deltas += [(sum(both) / len(both), name)] if both else []
    if len(deltas) < 2:
        return None
    (least, loser), (most, winner), unit = min(deltas), max(deltas), report.metric.unit
    return (
        f"By family, training {_name(group[0])} at {tokens(group[0].retained_tokens)} tokens changes the score between "
        f"{unit.change(least)} ({loser}) and {unit.change(most)} ({winner})."
    )


def _recovered(report: Report, free: float, gains: list[Gain]) -> str:
    """Share of the loss from pruning that training recovered."""
    dense = _dense(report)
    if dense is None or dense.score is None or dense.score - free < 0.01 or not all(gain.helps for gain in gains):
        return ""
    return f", {100 * _mean_delta(gains) / (dense.score - free):.0f} % of the loss from pruning recovered"


def _verdict(gains: list[Gain], unit: Unit) -> str:
    if len(gains) == 1:
        return _points(gains[0], unit)
    outside = sum(gain.helps for gain in gains)
    mean = unit.change(_mean_delta(gains))
    return f"{mean} on average, above the 95 % interval in {outside} of {len(gains)} seeds"


def _points(gain: Gain, unit: Unit) -> str:
    points = unit.change(gain.delta)
    return points if gain.helps else f"{points}, worse" if gain.hurts else f"{points}, inside the 95 % interval"


def _difference(row: Row, other: Row) -> Gain:
    gain = difference(row, other.score or 0.0, other.ci95)
    assert gain is not None
    return gain


def _dense(report: Report) -> Row | None:
    return next(iter(report.arm("dense")), None)


def _at(report: Report, arm: str, budget: float | None) -> list[Row]:
    """Scored rows of an arm that retain a number of tokens."""
    return [row for row in report.arm(arm) if row.retained_tokens == budget and row.score is not None]


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed alone."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.score is not None:
            groups.setdefault(row.recipe, []).append(row)
    return list(groups.values())


def _mean(group: Sequence[Row]) -> float:
    return sum(row.score or 0.0 for row in group) / len(group)


def _mean_delta(gains: Sequence[Gain]) -> float:
    return sum(gain.delta for gain in gains) / len(gains)


def _name(row: Row) -> str:
    return f"{row.pruner} at layer {row.layer}" if row.layer else str(row.pruner)


def _scored(groups: Sequence[list[Row]], unit: Unit) -> str:
    """Names with their scores: `pool (35.0 %), uniform (42.0 %)`."""
    return ", ".join(f"{_name(group[0])} ({unit.text(_mean(group))})" for group in groups)
