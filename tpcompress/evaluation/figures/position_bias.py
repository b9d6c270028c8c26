"""Draw retention maps of several pruners: how often each position of the image is retained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm

from tpcompress.evaluation.figures.canvas import new_figure, save
from tpcompress.evaluation.position_bias import RetentionMap

COLUMNS = 6
"""Maximum number of maps per row."""


def bias_figure(maps: Mapping[str, RetentionMap], path: str | Path) -> None:
    """Draw a small map for each pruner, on a common colour scale.

    Args:
        maps: maps by title.
        path: output image; its folder is created.

    Raises:
        ValueError: there is no map.
    """
    if not maps:
        raise ValueError("There is no retention map to draw; evaluate a model with a plan first.")
    cols = min(COLUMNS, len(maps))
    rows = -(-len(maps) // cols)
    figure, grid = new_figure(1.9 * cols + 0.9, 2.2 * rows + 0.2, rows, cols)
    scale = PowerNorm(0.5, 0, 1)  # typical frequencies are near the keep ratio, far below 1
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (words, one) in zip(grid.flat, maps.items(), strict=False):
        axes.imshow(one.frequency, norm=scale, cmap="viridis", interpolation="nearest")
        axes.set_title(f"{words}\nplaces {one.places}\nthirds {one.thirds}", fontsize=8)
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=grid, shrink=0.8, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("fraction of images that retain the token", fontsize=8)
    save(figure, path)
