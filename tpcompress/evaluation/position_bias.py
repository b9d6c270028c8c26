"""Measure where in the image retained tokens lie over a data set: frequency of each grid cell, and its uniformity.

I images, C cells of a common grid, R budget rows, V vision tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpcompress.evaluation.scoring.stats import NORMAL
from tpcompress.families import Layout
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import attachment_of, record
from tpcompress.insertion.trace import Trace

THIRDS = 3
"""Rows and columns of the coarse grid, on which a pruner that keeps every third token is uniform."""
FINEST = 32
"""Maximum number of rows and of columns of the common grid."""
BLOCK = 4096
"""Images whose unpacked maps are in memory at once."""

Shape = tuple[int, int]


class Uniformity(NamedTuple):
    """Uniformity in [0, 1] and the half width of its 95 % interval over images; both nan if undefined."""

    value: float
    ci95: float

    def __str__(self) -> str:
        return "–" if np.isnan(self.value) else f"{self.value:.2f} ±{self.ci95:.2f}"


def uniformity(kept_IC: np.ndarray) -> Uniformity:
    """How uniformly a pruner distributes its budget over the cells of a grid: 1 equally, 0 always the same cells.

    This index is ours. With f_c the fraction of images in which cell c is kept, and b its mean over the C cells,

        U = 1 - sum_c |f_c - b| / (2 C b (1 - b)),

    one minus the total variation distance to the uniform distribution, relative to the largest distance that this
    budget allows. With few images, |f_c - b| is positive by chance alone. Whether a cell is preferred is therefore
    decided on the other images: |f_c - b| is estimated by the mean over images i of sign(f_c - b, without i)
    (m_ic - b_i). A pruner that selects at random for every image then has U = 1 for any number of images, and one that
    always keeps the same cells has U = 0. The interval is that of the mean over images.

    Args:
        kept_IC: retained cells of each image: 0 or 1, or a fraction if a cell holds several tokens.
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
    half = NORMAL * float(share_I.std(ddof=1)) / number**0.5
    return Uniformity(min(1.0, max(0.0, float(share_I.mean()))), half)


@dataclass(frozen=True, eq=False)
class RetentionMap:
    """Retention frequencies of one stage over a data set.

    Attributes:
        stage, layer: index and layer of the stage.
        frequency: (rows, columns) of the common grid: fraction of images in which each cell is kept.
        num_images: images of the data set.
        places: uniformity over the cells of the common grid.
        thirds: uniformity over a 3 x 3 grid, which ignores the choice within a neighbourhood: a fixed regular grid is
            uniform, a pruner that prefers a side of the image is not.
    """

    stage: int
    layer: int
    frequency: np.ndarray
    num_images: int
    places: Uniformity
    thirds: Uniformity

    def save(self, path: str | Path) -> None:
        """Write an .npz file; its folder is created."""
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
    """Accumulates the retained tokens of all stages call by call; `maps` returns their frequencies.

    Every grid of tokens (an image, a tile of it, a frame of a video) is one map; the maps of one image are averaged.
    Grids of other shapes are resized to the most frequent shape, where each cell is the mean of the area it covers.
    """

    def __init__(self) -> None:
        self._layers: dict[int, int] = {}
        self._parts: dict[tuple[int, Shape], list[tuple[np.ndarray, np.ndarray]]] = {}
        self._images: dict[Hashable, int] = {}
        self._prefills = 0
        self._kept: dict[int, list[int]] = {}

    @property
    def retained(self) -> float | None:
        """Mean number of tokens per budget row after the last stage; None before the first `add`."""
        counts = self._kept.get(max(self._kept, default=0))
        return float(np.mean(counts)) if counts else None

    def add(self, trace: Trace, images: Sequence[Hashable] | None = None) -> None:
        """Add recorded prefills.

        Args:
            trace: trace of one or several prefills.
            images: the image of the data set that each sample of a prefill shows; repeated images (other questions)
                are averaged. Default: every sample of every prefill is a different image.
        """
        for stage in trace.stages:
            self._prefills += stage.stage == 0
            names = [(self._prefills, owner) if images is None else images[owner] for owner in stage.owner]
            numbers = np.array([self._images.setdefault(name, len(self._images)) for name in names])
            self._layers[stage.stage] = stage.layer
            self._kept.setdefault(stage.stage, []).extend(stage.vision_out)
            kept_RV = stage.retained_RV.cpu().numpy()
            for layouts, rows in _by_layout(stage.layouts):
                for shape, kept in _split_grids(kept_RV[rows], layouts):
                    self._parts.setdefault((stage.stage, shape), []).append((numbers[rows], np.packbits(kept, axis=1)))

    def maps(self) -> list[RetentionMap]:
        """The map of every stage; empty if nothing was pruned."""
        found = []
        for stage, layer in sorted(self._layers.items()):
            shape, kept_IC = self._common(stage)
            frequency = kept_IC.mean(0).reshape(shape)
            coarse = (min(THIRDS, shape[0]), min(THIRDS, shape[1]))
            thirds_IC = _resized(kept_IC.reshape(-1, *shape), coarse).reshape(len(kept_IC), -1)
            found.append(
                RetentionMap(stage, layer, frequency, len(kept_IC), uniformity(kept_IC), uniformity(thirds_IC))
            )
        return found

    def _common(self, stage: int) -> tuple[Shape, np.ndarray]:
        """The common grid of a stage, and the retained cells (I, C) of each image."""
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
                np.add.at(sums_IC, numbers[block], _resized(kept, common).reshape(len(kept), -1))
                np.add.at(counts_I, numbers[block], 1)
        seen_I = counts_I > 0
        return common, sums_IC[seen_I] / counts_I[seen_I, None].astype(np.float32)


def position_bias(model: Any, batches: Iterable[Mapping[str, Any]]) -> list[RetentionMap]:
    """Measure where a model with an attached plan retains tokens, with one prefill per batch.

    Args:
        model: model with an attached plan.
        batches: inputs of the model, such as `task.prepare(processor).batches`; `meta` of a collator identifies the
            samples of a batch that show the same image.

    Raises:
        ValueError: no plan is attached.
    """
    attachment_of(model)
    bias = PositionBias()
    with inference(model):
        for number, batch in enumerate(batches):
            inputs = {name: value for name, value in batch.items() if name != "meta"}
            with record(model) as trace:
                model(**inputs_for(model, inputs), use_cache=False)
            bias.add(trace, [(number, row) for row in batch["meta"].rows] if "meta" in batch else None)
    return bias.maps()


def _by_layout(layouts: Sequence[tuple[Layout, ...]]) -> list[tuple[tuple[Layout, ...], list[int]]]:
    """Group budget rows by their layouts."""
    groups: dict[tuple[Layout, ...], list[int]] = {}
    for row, listed in enumerate(layouts):
        groups.setdefault(tuple(listed), []).append(row)
    return list(groups.items())


def _split_grids(kept_RV: np.ndarray, layouts: tuple[Layout, ...]) -> Iterator[tuple[Shape, np.ndarray]]:
    """The shape of every grid, and the tokens retained of it by budget rows of one layout, bool (R, rows * columns)."""
    first = 0
    for grid in (grid for layout in layouts for grid in layout.grids):
        last = first + grid.rows * grid.cols
        yield (grid.rows, grid.cols), kept_RV[:, first:last]
        first = last


def _resized(maps: np.ndarray, shape: Shape) -> np.ndarray:
    """Resize maps (N, rows, columns) to another grid; each cell is the mean of the area it covers."""
    rows, cols = (_overlaps(old, new) for old, new in zip(maps.shape[1:], shape, strict=True))
    return np.einsum("ar,nrc,bc->nab", rows, maps.astype(np.float32), cols, optimize=True)


def _overlaps(old: int, new: int) -> np.ndarray:
    """(new, old): fraction of each new cell that each old cell covers, along one side."""
    starts, ends = np.arange(new)[:, None] * old / new, np.arange(1, new + 1)[:, None] * old / new
    overlap = np.minimum(ends, np.arange(1, old + 1)) - np.maximum(starts, np.arange(old))
    return (overlap.clip(0) * new / old).astype(np.float32)
