"""Which part of which image or frame lies under the vision tokens of one prompt, for drawing.

A field is an image, or a part of one, with a rectangle of tokens over it. One grid of tokens over an image of any size
is one field. Tiles of an image are put together again: the arrangement is the one whose mosaic resembles the image, so
no family has to declare it. Tokens without a position in the image (of a resampler) have a field without an image.

R budget rows, V vision tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tpcompress.evaluation.figures.canvas import denormalized
from tpcompress.evaluation.prompt import Media
from tpcompress.families.layout import Grid
from tpcompress.insertion.trace import StageTrace

ALIKE = 0.12
"""Largest mean difference, of values in [0, 1], between an image and the mosaic of its tiles."""
SMALL = 32
"""Side in pixels at which tiles are compared."""


@dataclass(frozen=True, eq=False)
class Field:
    """A rectangle of vision tokens and what lies under it.

    Attributes:
        image: the image, tile or frame; None if the tokens have no known position.
        index: int (rows, columns): number of each token in `StageTrace.retained_RV`, flattened.
        title: which image, and which part of it; empty for the whole of a single image.
        source: number of the image or frame.
    """

    image: Image.Image | None
    index: np.ndarray
    title: str = ""
    source: int = 0

    def kept(self, stage: StageTrace) -> np.ndarray:
        """bool (rows, columns): tokens retained after a stage."""
        kept: np.ndarray = stage.retained_RV.reshape(-1).cpu().numpy()[self.index]
        return kept


@dataclass(frozen=True, eq=False)
class _Piece:
    """One grid of tokens: its place in the record, and its tile of pixels if there is one per grid."""

    grid: Grid
    index: np.ndarray
    layout: int
    tile: Tensor | None = field(default=None)


def fields_of(stage: StageTrace, inputs: Mapping[str, Any], media: Media, image_processor: Any) -> list[Field]:
    """The fields of a prompt, images first.

    Args:
        stage: record of the first stage of a prefill of one prompt.
        inputs: output of the processor.
        media: input of the processor.
        image_processor: image processor, whose normalisation is undone.
    """
    pieces = {video: _pieces(stage, video) for video in (False, True)}
    images = list(media.images)
    if not pieces[True]:  # a family for which the frames of a video are images
        images += [frame for video in media.videos for frame in video]
    found: list[Field] = []
    groups = _by_image(_with_tiles(pieces[False], inputs), images, image_processor)
    for number, (image, group) in enumerate(groups):
        name = f"image {number + 1}" if len(groups) > 1 else ""
        found += _arranged(image, group, image_processor, name, number)
    for piece_number, piece in enumerate(pieces[True]):
        frames = media.videos[piece.layout] if piece.layout < len(media.videos) else []
        same = [other for other in pieces[True] if other.layout == piece.layout]
        place = same.index(piece)
        frame = frames[place * len(frames) // len(same)] if frames else None
        name = f"video {piece.layout + 1} · " if len(media.videos) > 1 else ""
        title = f"{name}frame {place * len(frames) // len(same) + 1}" if frames else f"{name}grid {place + 1}"
        found.append(Field(frame, piece.index, title, len(groups) + piece_number))
    return found


def _pieces(stage: StageTrace, video: bool) -> list[_Piece]:
    """All grids of images, or of videos, in the order of the record; layouts are numbered."""
    V, found, number = stage.retained_RV.shape[1], [], 0
    for row, layouts in enumerate(stage.layouts):
        first = row * V
        for layout in layouts:
            for grid in layout.grids:
                count = grid.rows * grid.cols
                index = np.arange(first, first + count).reshape(grid.rows, grid.cols)
                if count and layout.video == video:
                    found.append(_Piece(grid, index, number))
                first += count
            number += layout.video == video
    return found


def _with_tiles(pieces: Sequence[_Piece], inputs: Mapping[str, Any]) -> list[_Piece]:
    """The grids with their tiles of pixels, if the encoder got one tile per grid."""
    pixels = inputs.get("pixel_values")
    if not (isinstance(pixels, Tensor) and pixels.ndim >= 4 and pixels.shape[-3] == 3):
        return list(pieces)
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    if len(tiles) != len(pieces):
        return list(pieces)
    return [_Piece(piece.grid, piece.index, piece.layout, tile) for piece, tile in zip(pieces, tiles, strict=True)]


def _by_image(
    pieces: Sequence[_Piece], images: Sequence[Image.Image], image_processor: Any
) -> list[tuple[Image.Image | None, list[_Piece]]]:
    """The grids of each image; an image is None where its grids cannot be told from those of others."""
    groups: dict[int, list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.layout, []).append(piece)
    if len(images) == len(groups):
        return list(zip(images, groups.values(), strict=True))
    if len(images) == 1:
        return [(images[0], list(pieces))]
    counts = [_count_tiles(image_processor, image) for image in images]
    if sum(counts) == len(pieces):
        rest = iter(pieces)
        return [(image, list(islice(rest, count))) for image, count in zip(images, counts, strict=True)]
    return [(None, group) for group in groups.values()]


def _count_tiles(image_processor: Any, image: Image.Image) -> int:
    """Tiles that the processor makes of one image; 0 if it makes none."""
    pixels = image_processor([image], return_tensors="pt").get("pixel_values")
    return math.prod(pixels.shape[:-3]) if isinstance(pixels, Tensor) and pixels.ndim >= 4 else 0


def _arranged(
    image: Image.Image | None, pieces: Sequence[_Piece], image_processor: Any, name: str, source: int
) -> list[Field]:
    """The fields of one image."""
    shown = image
    if any(piece.grid.rows == 1 and piece.grid.cols > 1 for piece in pieces):
        shown = None  # a list of tokens without positions
    elif pieces and all(piece.tile is not None for piece in pieces) and not any(p.grid.newline for p in pieces):
        tiles = [denormalized(piece.tile, image_processor) for piece in pieces if piece.tile is not None]
        return _tiled(image, pieces, tiles, name, source)
    elif len(pieces) > 1 and not any(piece.grid.newline for piece in pieces):
        shown = None  # tiles of unknown origin; grids with newlines are merged tiles, and an overview
    parts = ["overview", "tiles"] if len(pieces) == 2 and pieces[1].grid.newline else _numbered(len(pieces))
    return [Field(shown, piece.index, _joined(name, part), source) for piece, part in zip(pieces, parts, strict=True)]


def _tiled(
    image: Image.Image | None, pieces: Sequence[_Piece], tiles: Sequence[np.ndarray], name: str, source: int
) -> list[Field]:
    """The fields of an image that the encoder got as tiles: overview and mosaic, or every tile by itself."""
    found = None if image is None or len(tiles) == 1 else _tiling(image, pieces, tiles)
    if found is None:
        parts = _numbered(len(tiles))
        return [
            Field(_to_image(tile), piece.index, _joined(name, part), source)
            for tile, piece, part in zip(tiles, pieces, parts, strict=True)
        ]
    first, rows, cols = found
    inside = range(first, first + rows * cols)
    fields = [
        Field(_to_image(tiles[number]), pieces[number].index, _joined(name, "overview"), source)
        for number in range(len(tiles))
        if number not in inside
    ]
    mosaic = Image.fromarray(np.rint(255 * _mosaic([tiles[n] for n in inside], cols)).astype(np.uint8))
    index = _mosaic([pieces[n].index for n in inside], cols)
    return [*fields, Field(mosaic, index, _joined(name, f"{rows} x {cols} tiles"), source)]


def _tiling(image: Image.Image, pieces: Sequence[_Piece], tiles: Sequence[np.ndarray]) -> tuple[int, int, int] | None:
    """First tile, rows and columns of the arrangement that resembles the image most; None if none does."""
    shapes = {piece.index.shape for piece in pieces} | {tile.shape for tile in tiles}
    if len(shapes) != 2:  # one shape of grids and one of tiles
        return None
    small = [np.asarray(_to_image(tile).resize((SMALL, SMALL), Image.Resampling.BOX)) / 255 for tile in tiles]
    candidates = []
    for first, number in ((0, len(tiles)), (0, len(tiles) - 1), (1, len(tiles) - 1)):
        for rows in (r for r in range(1, number + 1) if number % r == 0):
            cols = number // rows
            height, width = tiles[0].shape[0] * rows, tiles[0].shape[1] * cols
            stretch = abs(math.log(width / height * image.height / image.width))
            error = _unlike(image, _mosaic(small[first : first + number], cols))
            if number < len(tiles):  # the other one is an overview
                error = max(error, _unlike(image, small[-1 if first == 0 else 0]))
            candidates.append((round(error, 2), stretch, (first, rows, cols)))
    error, _, best = min(candidates)
    return best if error <= ALIKE else None


def _unlike(image: Image.Image, pixels: np.ndarray) -> float:
    """Mean difference between an image and pixels in [0, 1], at the size of the pixels."""
    resized = image.convert("RGB").resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.BOX)
    return float(np.abs(np.asarray(resized) / 255 - pixels).mean())


def _mosaic(parts: Sequence[np.ndarray], cols: int) -> np.ndarray:
    """Arrays of one shape side by side, `cols` of them in a row."""
    return np.concatenate([np.concatenate(parts[i : i + cols], 1) for i in range(0, len(parts), cols)])


def _to_image(tile: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(255 * tile).astype(np.uint8))


def _numbered(count: int) -> list[str]:
    return [f"part {number + 1}" if count > 1 else "" for number in range(count)]


def _joined(*words: str) -> str:
    return " · ".join(word for word in words if word)
