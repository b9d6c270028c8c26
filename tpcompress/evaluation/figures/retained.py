"""Record which vision tokens of an image a plan retains, and draw them for several pruners side by side."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from tpcompress.data.collate import ChatCollator
from tpcompress.data.rows import IMAGE_MARKER
from tpcompress.evaluation.figures.canvas import denormalized, new_figure, save
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import attachment_of, record
from tpcompress.insertion.trace import StageTrace

OUTLINE = "#ffd60a"


@dataclass(frozen=True)
class Retained:
    """Retained tokens of one image.

    Attributes:
        image: float (height, width, 3) in [0, 1]: the image as the vision tower receives it.
        keep: bool (rows, columns): retained tokens of the grid.
        cells: int (rows, columns): the retained token into which each token was merged; None unless the pruner merges.
        question: the question; prompt-dependent pruners depend on it.
    """

    image: np.ndarray
    keep: np.ndarray
    cells: np.ndarray | None = None
    question: str = ""


def retained_masks(model: Any, processor: Any, rows: Sequence[Mapping[str, Any]]) -> list[Retained]:
    """Record the tokens that the attached plan retains of the first image of each row, with its first question.

    Args:
        model: model with an attached plan.
        processor: processor of the model.
        rows: rows with images.

    Raises:
        ValueError: no plan is attached, or a row has no image that the plan prunes.
    """
    attachment, collator = attachment_of(model), ChatCollator(processor)
    samples = []
    with inference(model):
        for number, row in enumerate(rows):
            batch = collator([dict(row) | {name: row[name][:1] for name in ("conversations", "families")}])
            batch.pop("meta")
            with record(model) as trace:
                model(**inputs_for(model, batch), use_cache=False)
            if not trace.stages:
                raise ValueError(
                    f"Row {number} was not pruned: it has no image, or the plan is off; give rows with images."
                )
            sample = _retained(trace.stages, trace.stages[0].layouts[0][0].canvas, batch, processor, attachment.pruners)
            question = str(row["conversations"][0][0]["content"]).replace(IMAGE_MARKER, "").strip()
            samples.append(dataclasses.replace(sample, question=question))
    return samples


def retained_figure(samples: Mapping[str, Sequence[Retained]], path: str | Path) -> None:
    """Draw images as rows and pruners as columns, with dropped patches dimmed and merged cells outlined.

    Args:
        samples: `retained_masks` of the same images, by column title.
        path: output image; its folder is created.

    Raises:
        ValueError: no sample, or columns of unequal length.
    """
    lengths = {len(column) for column in samples.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"Every pruner needs the same images, at least one; got {sorted(lengths) or 'no pruner'}.")
    num_rows, columns = lengths.pop(), list(samples.items())
    size, width = 1.8, len(columns) + 1
    figure, grid = new_figure(size * width, size * num_rows + 0.35, num_rows, width)
    for number in range(num_rows):
        first = columns[0][1][number]
        _show(grid[number, 0], first.image)
        grid[number, 0].set_ylabel(textwrap.shorten(first.question, 34), fontsize=7)
        for place, (_, column) in enumerate(columns, start=1):
            _draw_retained(grid[number, place], column[number])
    for axes, (words, column) in zip(grid[0, 1:], columns, strict=True):
        axes.set_title(f"{words}\n{_count(column[0])}", fontsize=9)
    grid[0, 0].set_title(f"image\n{columns[0][1][0].keep.size} tokens", fontsize=9)
    save(figure, path)


def _count(sample: Retained) -> str:
    return f"{int(sample.keep.sum())} {'tokens' if sample.cells is None else 'merged cells'}"


def _retained(stages: list[StageTrace], grid: tuple[int, int], batch: dict, processor: Any, pruners: Any) -> Retained:
    """Build a sample from the trace of its prefill; budget row 0 starts with the first image."""
    count = grid[0] * grid[1]
    last = stages[-1]
    keep = last.retained_RV[0, :count].cpu().numpy().reshape(grid)
    merging = pruners[last.stage].merges and len(stages) == 1 and len(last.total) == 1
    cells = _cells(last, pruners[last.stage]) if merging else None
    image = denormalized(batch["pixel_values"][0], processor.image_processor)
    return Retained(image, keep, None if cells is None else cells.reshape(grid))


def _cells(stage: StageTrace, pruner: Any) -> np.ndarray | None:
    """The retained token into which each token was merged: the one with the largest gradient with respect to it."""
    if stage.view is None or stage.selection is None or stage.selection.vision_BVD is None:
        return None
    vision_BVD = stage.view.vision_BVD.detach().float().requires_grad_(True)
    with torch.enable_grad():
        out = pruner(dataclasses.replace(stage.view, vision_BVD=vision_BVD), torch.tensor(stage.vision_out))
        if out.vision_BVD is None or not out.vision_BVD.requires_grad:
            return None
        kept = out.keep_BV[0].nonzero()[:, 0].tolist()
        flow = [torch.autograd.grad(out.vision_BVD[0, k].sum(), vision_BVD, retain_graph=True)[0] for k in kept]
    return torch.stack([f[0].abs().sum(-1) for f in flow]).argmax(0).cpu().numpy()


def _draw_retained(axes: Axes, sample: Retained) -> None:
    height, width = sample.image.shape[:2]
    rows, cols = sample.keep.shape
    y, x = np.arange(height) * rows // height, np.arange(width) * cols // width
    if sample.cells is not None:
        _show(axes, sample.image)
        _outline(axes, sample.cells, height / rows, width / cols)
        return
    keep = sample.keep[y][:, x][..., None]
    grey = sample.image.mean(-1, keepdims=True)
    _show(axes, np.where(keep, sample.image, 0.74 + 0.2 * grey))
    _outline(axes, np.where(sample.keep, 1, 0), height / rows, width / cols, "#333333", 0.7)


def _outline(
    axes: Axes, cells: np.ndarray, height: float, width: float, colour: str = OUTLINE, thickness: float = 1.2
) -> None:
    """Draw lines between neighbouring tokens of different cells."""
    rows, cols = cells.shape
    for r, c in zip(*np.nonzero(cells[:, 1:] != cells[:, :-1]), strict=True):
        axes.plot([(c + 1) * width - 0.5] * 2, [r * height - 0.5, (r + 1) * height - 0.5], color=colour, lw=thickness)
    for r, c in zip(*np.nonzero(cells[1:] != cells[:-1]), strict=True):
        axes.plot([c * width - 0.5, (c + 1) * width - 0.5], [(r + 1) * height - 0.5] * 2, color=colour, lw=thickness)
    axes.set_xlim(-0.5, cols * width - 0.5)
    axes.set_ylim(rows * height - 0.5, -0.5)


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#999999")
