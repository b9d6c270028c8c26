"""Where in the picture retained tokens lie, over a data set: how often each place is kept, and how evenly.

I images, C places of a common grid, R budget rows, V vision tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm

from tpcompress.evaluation.figures.canvas import new_figure, save
from tpcompress.families import Layout
from tpcompress.inference import inference
from tpcompress.insertion.attach import controller_of, record
from tpcompress.insertion.trace import Trace

THIRDS = 3
"""Rows and columns of the coarse grid, on which a rule that keeps every third token is even."""
FINEST = 32
"""Rows and columns of the common grid, at most."""
BLOCK = 4096
"""Images whose maps are in memory as numbers at once."""
COLUMNS = 6

Shape = tuple[int, int]


class Uniformity(NamedTuple):
    """An index in [0, 1] and the half width of its 95 % interval over images; both nan where nothing can be said."""

    value: float
    ci95: float

    def __str__(self) -> str:
        return "–" if np.isnan(self.value) else f"{self.value:.2f} ±{self.ci95:.2f}"


def uniformity(kept_IC: np.ndarray) -> Uniformity:
    """How evenly a rule spreads its budget over the places of a grid: 1 all alike, 0 always the same ones. Ours.

    With f the share of images in which a place is kept, and b its mean over the C places,

        U = 1 - sum_c |f_c - b| / (2 C b (1 - b)),

    one minus the total variation distance to the uniform distribution, as a share of the largest that this budget
    allows. Chance alone makes |f_c - b| positive, the more so the fewer images; so whether place c is favoured is read
    off the other images: |f_c - b| is estimated by the mean over images i of sign(f_c - b, without i) (m_ic - b_i).
    A rule that draws at random for every image then has U = 1 at any number of images, one that always keeps the same
    places U = 0 exactly. The interval is that of the mean over images.

    Args:
        kept_IC: what each image keeps: 0 or 1, or a share where a place holds several tokens.
    """
    kept_IC = np.asarray(kept_IC, dtype=np.float64)
    number, places = kept_IC.shape
    budget = float(kept_IC.mean()) if kept_IC.size else 0.0
    if number < 2 or not 1e-9 < budget < 1 - 1e-9:
        return Uniformity(float("nan"), float("nan"))
    total_C, excess_I = kept_IC.sum(0), np.empty(number)
    for first in range(0, number, BLOCK):
        block = slice(first, first + BLOCK)
        others_IC = total_C - kept_IC[block]
        favoured_IC = np.sign(np.round(others_IC - others_IC.mean(1, keepdims=True), 9))
        excess_I[block] = (favoured_IC * (kept_IC[block] - kept_IC[block].mean(1, keepdims=True))).sum(1)
    share_I = 1 - excess_I / (2 * places * budget * (1 - budget))
    half = 1.96 * float(share_I.std(ddof=1)) / number**0.5
    return Uniformity(min(1.0, max(0.0, float(share_I.mean()))), half)


@dataclass(frozen=True, eq=False)
class RetentionMap:
    """What one stage retains over a data set.

    Attributes:
        stage, layer: of the plan.
        frequency: share of images in which each place is kept, (rows, columns) of the common grid.
        num_images: of the data set.
        places: uniformity over the places of that grid.
        thirds: uniformity over a 3 x 3 grid: blind to which token of a neighbourhood is kept, so that a fixed even
            grid is even here, and a rule that prefers a side is not.
    """

    stage: int
    layer: int
    frequency: np.ndarray
    num_images: int
    places: Uniformity
    thirds: Uniformity

    def save(self, path: str | Path) -> None:
        """Write an .npz file; its folder is made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        notes = np.array([self.stage, self.layer, self.num_images])
        indices = np.array([self.places, self.thirds])
        with open(path, "wb") as file:
            np.savez_compressed(file, frequency=self.frequency, notes=notes, uniformity=indices)

    @classmethod
    def load(cls, path: str | Path) -> RetentionMap:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No retention map at {path}; give a file that RetentionMap.save wrote.")
        with np.load(path) as file:
            stage, layer, number = (int(n) for n in file["notes"])
            places, thirds = (Uniformity(float(value), float(ci95)) for value, ci95 in file["uniformity"])
            return cls(stage, layer, file["frequency"], number, places, thirds)


class PositionBias:
    """Adds up what stages retain, call by call; `maps` says where it lies.

    Every rectangle of tokens (an image, a tile of it, a frame of a video) is one map of its own plane; the maps of one
    image are averaged. Rectangles of other shapes are stretched to the commonest one, each place taking the mean of
    the area that it covers.
    """

    def __init__(self) -> None:
        self._layers: dict[int, int] = {}
        self._parts: dict[tuple[int, Shape], list[tuple[np.ndarray, np.ndarray]]] = {}
        self._images: dict[Hashable, int] = {}
        self._prefills = 0
        self._kept: dict[int, list[int]] = {}

    @property
    def retained(self) -> float | None:
        """Mean number of tokens of a row behind the last stage; None before anything was added."""
        counts = self._kept.get(max(self._kept, default=0))
        return float(np.mean(counts)) if counts else None

    def add(self, trace: Trace, images: Sequence[Hashable] | None = None) -> None:
        """Add what was recorded.

        Args:
            trace: of one or several prefills.
            images: which image of the data set each sample of a prefill shows; the same again (another question
                about it) is averaged. Default: every sample of every prefill is an image of its own.
        """
        for stage in trace.stages:
            self._prefills += stage.stage == 0
            names = [(self._prefills, owner) if images is None else images[owner] for owner in stage.owner]
            numbers = np.array([self._images.setdefault(name, len(self._images)) for name in names])
            self._layers[stage.stage] = stage.layer
            self._kept.setdefault(stage.stage, []).extend(stage.vision_out)
            kept_RV = stage.retained_RV.cpu().numpy()
            for layouts, rows in _alike(stage.layouts):
                for shape, kept in _rectangles(kept_RV[rows], layouts):
                    self._parts.setdefault((stage.stage, shape), []).append((numbers[rows], np.packbits(kept, axis=1)))

    def maps(self) -> list[RetentionMap]:
        """The map of every stage; none if nothing was pruned."""
        found = []
        for stage, layer in sorted(self._layers.items()):
            shape, kept_IC = self._common(stage)
            frequency = kept_IC.mean(0).reshape(shape)
            coarse = (min(THIRDS, shape[0]), min(THIRDS, shape[1]))
            thirds_IC = _stretched(kept_IC.reshape(-1, *shape), coarse).reshape(len(kept_IC), -1)
            found.append(
                RetentionMap(stage, layer, frequency, len(kept_IC), uniformity(kept_IC), uniformity(thirds_IC))
            )
        return found

    def _common(self, stage: int) -> tuple[Shape, np.ndarray]:
        """The common grid of a stage, and (I, C) what each image keeps of it."""
        parts = {shape: listed for (number, shape), listed in self._parts.items() if number == stage}
        often = max(parts, key=lambda shape: sum(len(numbers) for numbers, _ in parts[shape]))
        common = (min(FINEST, often[0]), min(FINEST, often[1]))
        sums_IC = np.zeros((len(self._images), common[0] * common[1]), dtype=np.float32)
        counts_I = np.zeros(len(self._images))
        for shape, listed in parts.items():
            numbers, packed = (np.concatenate(arrays) for arrays in zip(*listed, strict=True))
            for first in range(0, len(numbers), BLOCK):
                block = slice(first, first + BLOCK)
                kept = np.unpackbits(packed[block], axis=1, count=shape[0] * shape[1]).reshape(-1, *shape)
                np.add.at(sums_IC, numbers[block], _stretched(kept, common).reshape(len(kept), -1))
                np.add.at(counts_I, numbers[block], 1)
        seen_I = counts_I > 0
        return common, sums_IC[seen_I] / counts_I[seen_I, None].astype(np.float32)


def position_bias(model: Any, batches: Iterable[Mapping[str, Any]]) -> list[RetentionMap]:
    """Where a model, pruned as it is attached, keeps tokens: one prefill per batch.

    Args:
        model: with a plan attached.
        batches: inputs of the model; a collator's `meta` tells which samples of a batch show the same image.

    Raises:
        ValueError: no plan is attached.
    """
    controller_of(model)
    bias, device = PositionBias(), next(model.parameters()).device
    with inference(model):
        for number, batch in enumerate(batches):
            inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "meta"}
            with record(model) as trace:
                model(**inputs, use_cache=False)
            bias.add(trace, [(number, row) for row in batch["meta"].rows] if "meta" in batch else None)
    return bias.maps()


def bias_figure(maps: Mapping[str, RetentionMap], path: str | Path) -> None:
    """Draw a small map for each pruner, on one scale of colours.

    Args:
        maps: by the words above each.
        path: an image file; its folder is made.

    Raises:
        ValueError: there is no map.
    """
    if not maps:
        raise ValueError("There is no retention map to draw; evaluate a model with a plan first.")
    cols = min(COLUMNS, len(maps))
    rows = -(-len(maps) // cols)
    figure, grid = new_figure(1.9 * cols + 0.9, 2.2 * rows + 0.2, rows, cols)
    scale = PowerNorm(0.5, 0, 1)  # a ninth of the tokens is a ninth of the images, far from 1
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (words, one) in zip(grid.flat, maps.items(), strict=False):
        axes.imshow(one.frequency, norm=scale, cmap="viridis", interpolation="nearest")
        axes.set_title(f"{words}\nplaces {one.places}\nthirds {one.thirds}", fontsize=8)
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=grid, shrink=0.8, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of images that keep the token", fontsize=8)
    save(figure, path)


def _alike(layouts: Sequence[tuple[Layout, ...]]) -> list[tuple[tuple[Layout, ...], list[int]]]:
    """Budget rows whose tokens lie alike."""
    groups: dict[tuple[Layout, ...], list[int]] = {}
    for row, listed in enumerate(layouts):
        groups.setdefault(tuple(listed), []).append(row)
    return list(groups.items())


def _rectangles(kept_RV: np.ndarray, layouts: tuple[Layout, ...]) -> Iterator[tuple[Shape, np.ndarray]]:
    """Rows and columns of every rectangle, and what rows of one layout keep of it, bool (R, rows * columns)."""
    first = 0
    for grid in (grid for layout in layouts for grid in layout.grids):
        last = first + grid.rows * grid.cols
        yield (grid.rows, grid.cols), kept_RV[:, first:last]
        first = last


def _stretched(maps: np.ndarray, shape: Shape) -> np.ndarray:
    """Maps (N, rows, columns) on another grid; each place is the mean of the area that it covers."""
    rows, cols = (_shares(old, new) for old, new in zip(maps.shape[1:], shape, strict=True))
    return np.einsum("ar,nrc,bc->nab", rows, maps.astype(np.float32), cols, optimize=True)


def _shares(old: int, new: int) -> np.ndarray:
    """(new, old): which share of each new cell each old one covers, along one side."""
    starts, ends = np.arange(new)[:, None] * old / new, np.arange(1, new + 1)[:, None] * old / new
    overlap = np.minimum(ends, np.arange(1, old + 1)) - np.maximum(starts, np.arange(old))
    return (overlap.clip(0) * new / old).astype(np.float32)
