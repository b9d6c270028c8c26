"""Figures without pyplot: nothing global, nothing to close, no display needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 150


def new_figure(width: float, height: float, rows: int = 0, cols: int = 0) -> tuple[Figure, Any]:
    """A figure of so many inches, and its one axes or an array of them."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows or 1, cols or 1, squeeze=not rows)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
