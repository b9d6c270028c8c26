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
from tpcompress.data.rows import IMAGE_MARKER, open_image
from tpcompress.evaluation.figures.canvas import dimmed, new_figure, save
from tpcompress.evaluation.figures.fields import Field, fields_of
from tpcompress.evaluation.prompt import Media
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import attachment_of, record
from tpcompress.insertion.trace import StageTrace

OUTLINE = "#ffd60a"
SIDE = 512
"""Longest side in pixels of a drawn image."""


@dataclass(frozen=True)
class Retained:
    """Retained tokens of the first image of a prompt.

    Attributes:
        image: float (height, width, 3) in [0, 1]: the image, or the mosaic of its tiles; grey where tokens have no
            position in the image.
        keep: bool (rows, columns): retained tokens of the grid.
        cells: int (rows, columns): the retained token into which each token was merged; None unless the pruner merges
            and something was merged.
        question: the question; prompt-dependent pruners depend on it.
        overview: the same of the overview beside the tiles; None without one.
    """

    image: np.ndarray
    keep: np.ndarray
    cells: np.ndarray | None = None
    question: str = ""
    overview: Retained | None = None

    @property
    def kept(self) -> int:
        """Number of retained tokens, those of the overview included."""
        return int(self.keep.sum()) + (0 if self.overview is None else self.overview.kept)

    @property
    def total(self) -> int:
        """Number of tokens, those of the overview included."""
        return self.keep.size + (0 if self.overview is None else self.overview.total)


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
            media = Media([open_image(image) for image in row["images"]])
            sample = _retained(trace.stages, batch, media, processor.image_processor, attachment.pruners)
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
    grid[0, 0].set_title(f"image\n{columns[0][1][0].total} tokens", fontsize=9)
    save(figure, path)


def _count(sample: Retained) -> str:
    return f"{sample.kept} {'tokens' if sample.cells is None else 'merged cells'}"


def _retained(stages: list[StageTrace], batch: dict, media: Media, image_processor: Any, pruners: Any) -> Retained:
    """Build a sample from the trace of its prefill: the largest field of the first image, and its overview."""
    fields = fields_of(stages[0], batch, media, image_processor)
    last, fields = stages[-1], [each for each in fields if each.source == fields[0].source]
    main = max(fields, key=lambda each: each.index.size)
    others = [each for each in fields if each is not main]
    merging = pruners[last.stage].merges and len(stages) == 1
    cells = _cells(last, pruners[last.stage]) if merging else None

    def drawn(part: Field, overview: Retained | None = None) -> Retained:
        return Retained(_pixels(part), part.kept(last), None if cells is None else cells[part.index], overview=overview)

    return drawn(main, drawn(others[0]) if len(others) == 1 else None)


def _pixels(drawn: Field) -> np.ndarray:
    """float (height, width, 3) in [0, 1], at most `SIDE` pixels on a side."""
    if drawn.image is None:
        rows, cols = drawn.index.shape
        return np.full((8 * rows, 8 * cols, 3), 0.6)
    image = drawn.image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image) / 255


def _cells(stage: StageTrace, pruner: Any) -> np.ndarray | None:
    """The retained token into which each token was merged: the one with the largest gradient with respect to it.

    Tokens and their numbers are those of `StageTrace.retained_RV`, flattened. None if nothing was merged, or the rows
    of the view are not those of the record.
    """
    if stage.view is None or stage.selection is None or stage.selection.vision_BVD is None:
        return None
    R, V = stage.retained_RV.shape
    if stage.view.vision_BVD.shape[:2] != (R, V):
        return None
    vision_BVD = stage.view.vision_BVD.detach().float().requires_grad_(True)
    with torch.enable_grad():
        out = pruner(dataclasses.replace(stage.view, vision_BVD=vision_BVD), torch.tensor(stage.vision_out))
        if out.vision_BVD is None or not out.vision_BVD.requires_grad:
            return None
        # Rows do not know each other, so one gradient is taken for the n-th retained token of all of them.
        kept = [keep_V.nonzero()[:, 0].tolist() for keep_V in out.keep_BV]
        best_RV, cells_RV = torch.full((R, V), -1.0), torch.zeros(R, V, dtype=torch.long)
        for number in range(max(map(len, kept))):
            asked = [(row, columns[number]) for row, columns in enumerate(kept) if number < len(columns)]
            total = torch.stack([out.vision_BVD[row, column].sum() for row, column in asked]).sum()
            flow_RV = torch.autograd.grad(total, vision_BVD, retain_graph=True)[0].abs().sum(-1).cpu()
            flow_RV[[row for row in range(R) if number >= len(kept[row])]] = -1
            cells_RV = torch.where(flow_RV > best_RV, number, cells_RV)
            best_RV = torch.maximum(flow_RV, best_RV)
    return (cells_RV + V * torch.arange(R)[:, None]).flatten().numpy()


def _draw_retained(axes: Axes, sample: Retained) -> None:
    height, width = sample.image.shape[:2]
    rows, cols = sample.keep.shape
    y, x = np.arange(height) * rows // height, np.arange(width) * cols // width
    if sample.cells is not None:
        _show(axes, sample.image)
        _outline(axes, sample.cells, height / rows, width / cols)
        return
    keep = sample.keep[y][:, x][..., None]
    _show(axes, np.where(keep, sample.image, dimmed(sample.image, 1)))
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
