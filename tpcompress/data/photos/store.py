"""The photographs of scenes: a folder that `scripts/build_photos.py` fills, loaded by class and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from tpcompress.bundled import BUILD_PHOTOS, photos_folder
from tpcompress.data.photos.catalogue import OBJECTS, PLACES, SPLITS

Pictures = Mapping[str, Sequence[Image.Image]]


@dataclass(frozen=True)
class Photographs:
    """Cut-outs and backgrounds of one side: those of training scenes, or those of test scenes.

    Attributes:
        objects: cut-outs of each class, RGBA, cropped to what is visible.
        places: backgrounds of each place, RGB.
    """

    objects: Pictures
    places: Pictures


def side_of(split: str) -> str:
    """Whose photographs a split shows: `validation` shows those of `train`.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"No split {split!r} of photos; choose one of {', '.join(SPLITS)}.")
    return "test" if split == "test" else "train"


def load_photographs(split: str, folder: str | Path | None = None) -> Photographs:
    """Read the photographs of a split.

    Raises:
        FileNotFoundError: the folder was not built, or lacks a class; with the command to build it.
        ValueError: there is no such split.
    """
    return _load(side_of(split), photos_folder(folder))


@lru_cache(maxsize=4)
def _load(side: str, folder: Path) -> Photographs:
    root = folder / "photographs"
    return Photographs(
        {name: _pictures(root / "objects" / name, side, "RGBA") for name in OBJECTS},
        {name: _pictures(root / "places" / name, side, "RGB") for name in PLACES},
    )


def _pictures(folder: Path, side: str, mode: str) -> list[Image.Image]:
    found = [Image.open(path).convert(mode) for path in sorted(folder.glob(f"{side}-*.webp"))]
    if not found:
        raise FileNotFoundError(f"No {side} photographs in {folder}; build them with {BUILD_PHOTOS}.")
    return found
