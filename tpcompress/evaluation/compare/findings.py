"""What a report says in words: every sentence is computed from its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcompress.evaluation.compare.row import Gain, Row, difference
from tpcompress.evaluation.compare.table import percent, tokens

if TYPE_CHECKING:
    from tpcompress.evaluation.compare.report import Report

BASELINES = ("random", "uniform")
"""A pruner that does not beat these has not earned its place."""


def findings(report: Report) -> list[str]:
    """Sentences on the base, on pruning without training, on training with it, and on the export."""
    sentences = _on_dense(report)
    for budget in _budgets(report):
        sentences += _on_training_free(report, budget)
    for smaller in report.arm("downsample"):
        sentences += _on_smaller_pictures(report, smaller)
    for group in _groups(report.arm("training_aware")):
        sentences += _on_training_aware(report, group)
    for budget in _budgets(report):
        sentences += _on_ranking(report, budget)
    return sentences + _on_export(report)


def _on_dense(report: Report) -> list[str]:
    dense, sentences = _dense(report), []
    if dense is not None:
        blind = "" if report.blind_score is None else f"; with blanked images {percent(report.blind_score)} %"
        number = len(report.learnt)
        families = f"the mean of {number} learnt families" if number != 1 else f"family {report.learnt[0]}"
        sentences.append(f"The dense base scores {percent(dense.score)} % ({families}){blind}.")
    rest = [name for name in report.families if name not in report.learnt]
    if rest:
        sentences.append(f"Not learnt by the base, so not in any score: {', '.join(rest)}.")
    for control in [row for row in report.arm("dense_ft") if row.pruner is None]:
        if dense is not None:
            gain = _difference(control, dense)
            sentences.append(f"The same extra steps without a pruner move the dense score by {_points(gain)}.")
    return sentences


def _on_training_free(report: Report, budget: float) -> list[str]:
    rows = [row for row in report.arm("training_free") if row.retained_tokens == budget and row.score is not None]
    groups = sorted(_groups(rows), key=lambda group: -_mean(group))
    if len(groups) < 2:
        return []
    best, dense = groups[0], _dense(report)
    text = f"Without training, at {tokens(budget)} tokens: {_name(best[0])} is best with {percent(_mean(best))} %"
    if dense is not None and dense.score is not None:
        text += f" ({100 * (_mean(best) - dense.score):+.1f} against dense)"
    floor = max((group for group in groups if group[0].pruner in BASELINES), key=_mean, default=None)
    if floor is None:
        return [text + "."]
    others = [group for group in groups if group[0].pruner not in BASELINES]
    beaten = [group for group in others if not _difference(group[0], floor[0]).helps]
    if beaten:
        names = ", ".join(f"{_name(group[0])} ({percent(_mean(group))} %)" for group in beaten)
        text += f"; not better than {_name(floor[0])} ({percent(_mean(floor))} %): {names}"
    elif others:
        text += f"; every rule beats {_name(floor[0])} ({percent(_mean(floor))} %)"
    return [text + "."]


def _on_smaller_pictures(report: Report, smaller: Row) -> list[str]:
    """Which rules plain down-sampling makes superfluous at its budget."""
    if smaller.score is None:
        return []
    text = f"Pictures of {tokens(smaller.retained_tokens)} tokens, without any pruner, score {percent(smaller.score)} %"
    free = [row for row in report.arm("training_free") if row.keep_tokens == smaller.keep_tokens]
    groups = _groups(free)
    beaten = [group for group in groups if not _difference(group[0], smaller).helps]
    if beaten:
        names = ", ".join(f"{_name(group[0])} ({percent(_mean(group))} %)" for group in beaten)
        text += f"; not better without training: {names}"
    elif groups:
        text += "; every rule beats that without training"
    return [text + "."]


def _on_training_aware(report: Report, group: list[Row]) -> list[str]:
    row, score = group[0], _mean(group)
    sentences = []
    gains = [gain for r in group if (gain := report.gain(r)) is not None]
    text = f"{_name(row)} at {tokens(row.retained_tokens)} tokens, trained in the loop, reaches {percent(score)} %"
    if gains:
        free = score - _mean_delta(gains)
        text += f" against {percent(free)} % without training ({_verdict(gains)}{_recovered(report, free, gains)})"
    text += "; " + _control_clause(report, group, gains) + "."
    sentences.append(text)
    shift = _family_shift(report, group)
    sentences += [shift] if shift else []
    for name in BASELINES:
        baseline = [
            r for r in report.arm("training_free") if r.pruner == name and r.retained_tokens == row.retained_tokens
        ]
        if baseline and row.pruner != name and _mean(baseline) > score:
            sentences.append(
                f"ALARM: {_name(row)} trained at {tokens(row.retained_tokens)} tokens ends under untrained {name} "
                f"({percent(_mean(baseline))} %)."
            )
    return sentences


def _control_clause(report: Report, group: list[Row], gains: list[Gain]) -> str:
    controls = [gain for row in group if (gain := report.control_gain(row)) is not None]
    if not controls:
        return "no control was run, so extra training alone is not ruled out as the cause"
    text = f"the same steps without the pruner, then pruned, reach {percent(_mean(group) - _mean_delta(controls))} %"
    if all(gain.helps for gain in controls):
        return f"{text}, so it is the pruner in the loop that helps ({_verdict(controls)})"
    if any(gain.helps for gain in controls):
        return f"{text} ({_verdict(controls)})"
    if any(gain.hurts for gain in controls):
        return f"{text}, which is better: the pruner in the loop did harm ({_verdict(controls)})"
    if gains and all(gain.helps for gain in gains):
        return f"{text}, so the extra steps explain the gain, not the pruner in the loop"
    return f"{text}, which is no different"


def _on_ranking(report: Report, budget: float) -> list[str]:
    """Whether the pruner to choose changes when it may be trained."""
    free = [row for row in report.arm("training_free") if row.retained_tokens == budget and row.score is not None]
    aware = [row for row in report.arm("training_aware") if row.retained_tokens == budget and row.score is not None]
    if not free or not aware:
        return []
    best_free = max(_groups(free), key=_mean)[0]
    best_aware = max(_groups(aware), key=_mean)[0]
    gain = _difference(best_aware, best_free)
    what = f"At {tokens(budget)} tokens the best trained model ({_name(best_aware)}, {percent(best_aware.score)} %)"
    against = f"the best untrained one ({_name(best_free)}, {percent(best_free.score)} %)"
    if gain.helps:
        text = f"{what} beats {against} by {100 * gain.delta:.1f}"
    elif gain.hurts:
        text = f"{what} stays {-100 * gain.delta:.1f} behind {against}"
    else:
        text = f"{what} is not clearly different from {against}"
    rank = [row.pruner for row in sorted(free, key=lambda row: -(row.score or 0))]
    if best_aware.pruner in rank and best_aware.pruner != best_free.pruner and gain.helps:
        place = list(dict.fromkeys(rank)).index(best_aware.pruner) + 1
        text += f"; {_name(best_aware)} is number {place} of {len(set(rank))} without training"
    return [text + "."]


def _on_export(report: Report) -> list[str]:
    if not report.export:
        return []
    if report.export.get("verified"):
        return [f"The export in {report.export.get('dir')} was loaded again and agrees with the trained model."]
    return [f"The export in {report.export.get('dir')} is NOT verified."]


# ---------------------------------------------------------------------------------------------------- parts


def _family_shift(report: Report, group: list[Row]) -> str | None:
    """Which families training moved most and least: the mean hides opposite axes."""
    pairs = [(row, twin) for row in group if (twin := report.twin(row, "training_free")) is not None]
    deltas = []
    for name in report.learnt:
        known = [(r.families.get(name), t.families.get(name)) for r, t in pairs]
        both = [a - b for a, b in known if a is not None and b is not None]
        deltas += [(sum(both) / len(both), name)] if both else []
    if len(deltas) < 2:
        return None
    (least, loser), (most, winner) = min(deltas), max(deltas)
    return (
        f"By family, training {_name(group[0])} at {tokens(group[0].retained_tokens)} tokens changes accuracy from "
        f"{100 * least:+.1f} ({loser}) to {100 * most:+.1f} ({winner})."
    )


def _recovered(report: Report, free: float, gains: list[Gain]) -> str:
    """How much of what pruning cost came back."""
    dense = _dense(report)
    if dense is None or dense.score is None or dense.score - free < 0.01 or not all(gain.helps for gain in gains):
        return ""
    return f", {100 * _mean_delta(gains) / (dense.score - free):.0f} % of what pruning cost"


def _verdict(gains: list[Gain]) -> str:
    mean = f"{100 * _mean_delta(gains):+.1f}"
    if len(gains) == 1:
        return _points(gains[0])
    outside = sum(gain.helps for gain in gains)
    return f"{mean} on average, above the 95 % interval in {outside} of {len(gains)} seeds"


def _points(gain: Gain) -> str:
    points = f"{100 * gain.delta:+.1f}"
    return points if gain.helps else f"{points}, worse" if gain.hurts else f"{points}, inside the 95 % interval"


def _difference(row: Row, other: Row) -> Gain:
    gain = difference(row, other.score or 0.0, other.ci95)
    assert gain is not None
    return gain


def _dense(report: Report) -> Row | None:
    return next(iter(report.arm("dense")), None)


def _budgets(report: Report) -> list[float]:
    """Retained tokens of pruned rows, from many to few."""
    return sorted({row.retained_tokens for row in report.rows if row.pruner and row.retained_tokens}, reverse=True)


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ in their seed alone."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.score is not None:
            groups.setdefault(row.recipe, []).append(row)
    return list(groups.values())


def _mean(group: list[Row]) -> float:
    return sum(row.score or 0.0 for row in group) / len(group)


def _mean_delta(gains: list[Gain]) -> float:
    return sum(gain.delta for gain in gains) / len(gains)


def _name(row: Row) -> str:
    return f"{row.pruner} at layer {row.layer}" if row.layer else str(row.pruner)
