"""Draw the accuracy of a comparison against retained tokens, training-free and training-aware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.figures.canvas import new_figure, save
from tpcompress.evaluation.scoring.metrics import PERCENT
from tpcompress.insertion.budget import amount_text

GREY = "#555555"
MANY = 16
"""Number of pruners above which the legend is placed beside the axes."""


def accuracy_figure(report: Report, path: str | Path) -> None:
    """Draw accuracy against retained tokens: open markers are training-free, filled ones training-aware.

    Crosses are the control (the same extra steps without a pruner, then pruned), squares the base on smaller images.
    Horizontal lines are the dense base, the dense base after the same steps, and the blind baseline. Error bars are
    95 % intervals over rows; seeds are averaged.

    Args:
        report: report with at least one scored row.
        path: output image; its folder is created.

    Raises:
        ValueError: no row has a score.
    """
    if not any(row.score is not None for row in report.rows):
        raise ValueError("The report has no row with a score, so there is nothing to draw; evaluate a model first.")
    curves = _curves(report)
    budgets = {point.tokens for points in curves.values() for point in points}
    # Sorted by the score at the largest budget, so that a long legend has the order of the right ends of the curves.
    last = {pruner: max(points[-1].score for (_, n), points in curves.items() if n == pruner) for _, pruner in curves}
    colours = _colours(sorted(last, key=lambda name: (-last[name], name)) if len(last) > MANY else sorted(last))
    figure, axes = new_figure(*((7.5, 5.0) if len(last) <= MANY else (11.0, max(6.0, 0.19 * len(last)))))
    if len(budgets) > 1:
        _draw_curves(axes, curves, colours, sorted(budgets))
    else:
        _draw_columns(axes, curves, colours)
    unit = report.metric.unit
    if unit == PERCENT:
        axes.set_ylim(0, 103)
    _draw_levels(axes, report)
    words = "%" if unit == PERCENT else unit.title
    axes.set_ylabel(f"{report.metric.title.lower()}, mean of {'learnt' if report.learnt else 'all'} families ({words})")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


@dataclass(frozen=True)
class _Point:
    tokens: float
    score: float
    ci95: float


Curves = dict[tuple[str, str], list[_Point]]

_MARKS: dict[str, dict[str, Any]] = {
    "downsample": {"marker": "s", "markerfacecolor": "white", "linestyle": "-."},
    "oracle": {"marker": "*", "linestyle": "-."},
    "training_free": {"marker": "o", "markerfacecolor": "white", "linestyle": "--"},
    "training_aware": {"marker": "o", "linestyle": "-"},
    "dense_ft": {"marker": "x", "linestyle": ":", "linewidth": 1.0},
}
_DODGE = {"downsample": 1.0, "oracle": 1.0, "training_free": 0.985, "dense_ft": 1.0, "training_aware": 1.015}
"""Horizontal offsets, as factors on a logarithmic axis, that separate the markers of one budget."""

_WORDS = {
    "downsample": "smaller image, no pruner",
    "oracle": "told which tokens",
    "training_free": "training-free",
    "dense_ft": "control: same steps, then pruned",
    "training_aware": "training-aware",
}


def _curves(report: Report) -> Curves:
    """Points of each (arm, pruner), averaged over seeds, by increasing number of tokens."""
    groups: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = {}

    def put(arm: str, row: Row, score: float | None, ci95: float | None) -> None:
        pruner = {"downsample": "smaller image", "oracle": "oracle"}.get(row.arm, row.pruner)
        if pruner is not None and row.retained_tokens and score is not None:  # 0 is not on a logarithmic axis
            name = f"{pruner} @ layer {row.layer}" if row.layer else pruner
            points = groups.setdefault((arm, name), {})
            points.setdefault(row.retained_tokens, []).append((score, ci95 or 0.0))

    for row in report.rows:
        put(row.arm, row, row.score, row.ci95)
        if row.arm == "training_aware" and report.twin(row, "dense_ft") is None:
            put("dense_ft", row, row.control_score, 0.0)
    curves: Curves = {}
    for key, points in groups.items():
        means = {tokens: np.mean(values, axis=0) for tokens, values in sorted(points.items())}
        scale = report.metric.unit.scale
        curves[key] = [_Point(tokens, scale * float(s), scale * float(ci)) for tokens, (s, ci) in means.items()]
    return curves


def _draw_curves(axes: Axes, curves: Curves, colours: dict[str, Any], budgets: list[float]) -> None:
    """Several budgets: one line per pruner on a logarithmic axis."""
    for (arm, pruner), points in curves.items():
        x = [point.tokens * _DODGE[arm] for point in points]
        style = _MARKS[arm] | {"clip_on": False}  # a marker at 0 or at the edge is drawn whole
        axes.plot(x, [p.score for p in points], color=colours[pruner], markersize=6, zorder=3, **style)
        _bars(axes, x, points, colours[pruner])
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [amount_text(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlim(min(budgets) / 1.25, max(budgets) * 1.25)
    axes.set_xlabel("vision tokens retained per question")
    handles = [Line2D([], [], color=colours[name], linewidth=3, label=name) for name in colours]
    _legend(axes, handles + _arm_handles(curves))


def _draw_columns(axes: Axes, curves: Curves, colours: dict[str, Any]) -> None:
    """One budget: one column per pruner, with an arrow from training-free to training-aware."""
    best = {name: max(p.score for (_, n), ps in curves.items() if n == name for p in ps) for name in colours}
    place = {name: i for i, name in enumerate(sorted(best, key=lambda name: -best[name]))}
    offset = {"training_free": -0.16, "downsample": 0.0, "oracle": 0.0, "dense_ft": 0.0, "training_aware": 0.16}
    for (arm, pruner), points in curves.items():
        x = [place[pruner] + offset[arm]] * len(points)
        style = _MARKS[arm] | {"linestyle": "", "clip_on": False}
        axes.plot(x, [p.score for p in points], color=colours[pruner], markersize=9, zorder=3, **style)
        _bars(axes, x, points, colours[pruner])
    for name, i in place.items():
        start, end = curves.get(("training_free", name)), curves.get(("training_aware", name))
        if start and end and abs(end[0].score - start[0].score) > 4:
            axes.annotate(
                "", (i + 0.14, end[0].score), (i - 0.14, start[0].score), zorder=2,
                arrowprops={"arrowstyle": "->", "color": colours[name], "alpha": 0.6, "shrinkA": 7, "shrinkB": 7},
            )  # fmt: skip
    axes.set_xticks(list(place.values()), list(place), rotation=20 if len(place) > 5 else 0)
    axes.set_xlim(-0.6, max(len(place), 1) - 0.4)
    tokens = next((points[0].tokens for points in curves.values()), None)
    axes.set_xlabel("" if tokens is None else f"pruner, {amount_text(tokens)} vision tokens retained per question")
    _legend(axes, _arm_handles(curves))


def _bars(axes: Axes, x: Sequence[float], points: Sequence[_Point], colour: Any) -> None:
    axes.errorbar(
        x, [p.score for p in points], [p.ci95 for p in points], fmt="none", ecolor=colour, capsize=3, zorder=2
    )


def _draw_levels(axes: Axes, report: Report) -> None:
    """Draw horizontal lines: dense, dense after the same steps, blind."""
    after: list[float | None] = [
        row.score for row in report.arm("dense_ft") if row.pruner is None and row.score is not None
    ]
    dense: list[float | None] = [row.score for row in report.arm("dense") if row.score is not None]
    levels: list[tuple[str, list[float | None], str]]
    levels = [("dense", dense[:1], "-"), ("dense, same steps", after[:1], "--"), ("blind", [report.blind_score], ":")]
    unit, drawn = report.metric.unit, list[tuple[float, str]]()
    for name, values, style in levels:
        for value in [v for v in values if v is not None]:
            height = unit.scale * value
            axes.axhline(height, color=GREY, linewidth=1.2, linestyle=style, zorder=1)
            drawn.append((height, f"{name} {unit.number(value)}"))
    # Labels are placed right of the axes and do not overlap where lines are close together.
    low, high = axes.get_ylim()
    apart, last = 0.0437 * (high - low), float("inf")  # 4.5 points of the 103 of a percent axis
    for value, words in sorted(drawn, reverse=True):
        last = min(value, last - apart)
        axes.annotate(
            words, (1.0, last), xycoords=axes.get_yaxis_transform(), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=9, color=GREY, annotation_clip=False,
        )  # fmt: skip


def _arm_handles(curves: Curves) -> list[Line2D]:
    arms = [arm for arm in _WORDS if any(a == arm for a, _ in curves)]
    return [Line2D([], [], color="black", markersize=6, label=_WORDS[arm], **_MARKS[arm]) for arm in arms]


def _legend(axes: Axes, handles: list[Line2D]) -> None:
    figure = axes.figure
    assert isinstance(figure, Figure)
    if len(handles) > MANY:
        figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right upper")
    elif handles:
        figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside upper center", ncols=4)


def _colours(names: Sequence[str]) -> dict[str, Any]:
    if len(names) > MANY:  # a palette has too few colours: a colour map in the order of the legend
        return {name: matplotlib.colormaps["turbo"](i / (len(names) - 1)) for i, name in enumerate(names)}
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(i) for i, name in enumerate(names)}
