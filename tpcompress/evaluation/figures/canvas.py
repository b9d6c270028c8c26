"""Create and save matplotlib figures without pyplot (no global state, no display), and convert pixels to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

DPI = 150


def new_figure(
    width: float, height: float, rows: int = 0, cols: int = 0, heights: Sequence[float] | None = None
) -> tuple[Figure, Any]:
    """Create a figure of a size in inches, with one axes or an array of them, whose rows have relative heights."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows or 1, cols or 1, squeeze=not rows, height_ratios=heights)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; its folder is created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def denormalized(pixels: Tensor, image_processor: Any) -> np.ndarray:
    """Undo the normalisation of an image (3, H, W).

    Returns:
        float (H, W, 3) in [0, 1]: the image as the vision tower receives it.
    """
    values = pixels.float().cpu().numpy().transpose(1, 2, 0)
    if getattr(image_processor, "do_normalize", True):
        values = values * np.asarray(image_processor.image_std) + np.asarray(image_processor.image_mean)
    return values.clip(0, 1)


def dimmed(pixels: np.ndarray, white: float = 255) -> np.ndarray:
    """Grey in which dropped tokens are drawn, darker than paper and lighter than ink, so that both stay apart from it.

    Args:
        pixels: (H, W, 3).
        white: value of white.

    Returns:
        float (H, W, 1).
    """
    grey: np.ndarray = 0.6 * white + 0.2 * pixels.mean(-1, keepdims=True)
    return grey
