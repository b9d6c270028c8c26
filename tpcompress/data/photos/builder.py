"""Scenes as rows: `{"images": [image], "conversations": [[question, answer], ...], "families": [...]}`.

Scene `index` of a split depends on (split, seed, index, evidence) alone, so splits can have any size, and a larger one
starts with the scenes of a smaller one.
"""

from __future__ import annotations

import io
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
from PIL import Image

from tpcompress.data.photos.questions import Question, ask
from tpcompress.data.photos.scene import Evidence, Layout, draw_scene
from tpcompress.data.photos.store import Photographs, load_photographs, side_of

_TURN = {"role": datasets.Value("string"), "content": datasets.Value("string")}
_FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "conversations": datasets.List(datasets.List(_TURN)),
        "families": datasets.List(datasets.Value("string")),
    }
)


def scene_of(
    photographs: Photographs, split: str, seed: int, index: int, evidence: Evidence | None = None
) -> tuple[np.ndarray, Layout, list[Question]]:
    """One scene: its pixels (224, 224, 3) uint8, its layout and its questions.

    Raises:
        ValueError: there is no such split.
    """
    side_of(split)
    pixels, layout = draw_scene(Random(f"photos/{split}/{seed}/{index}"), photographs, evidence)
    return pixels, layout, ask(layout, question_rng(split, seed, index))


def question_rng(split: str, seed: int, index: int) -> Random:
    """Generator of the random questions of a scene, apart from that of its picture."""
    return Random(f"photos/{split}/{seed}/{index}/questions")


def make_row(
    photographs: Photographs, split: str, seed: int, index: int, evidence: Evidence | None = None
) -> dict[str, Any]:
    """One scene as a row with a PIL image.

    Raises:
        ValueError: there is no such split.
    """
    pixels, _, questions = scene_of(photographs, split, seed, index, evidence)
    return {
        "images": [Image.fromarray(pixels)],
        "conversations": [
            [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
            for question in questions
        ],
        "families": [question.family for question in questions],
    }


def load_photos(
    split: str,
    num_images: int,
    seed: int = 0,
    folder: str | Path | None = None,
    evidence: Evidence | None = None,
) -> datasets.Dataset:
    """Draw the first scenes of a split and hold them in memory, as PNG.

    Args:
        split: `train`, `validation` or `test`.
        num_images: number of scenes.
        seed: series of scenes within the split.
        folder: what `scripts/build_photos.py` built, see `photos_folder`.
        evidence: sizes of what is asked about.

    Raises:
        FileNotFoundError: the photographs were not built; with the command to build them.
        ValueError: there is no such split, or `num_images` is not positive.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; it must be at least 1.")
    photographs = load_photographs(split, folder)
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for index in range(num_images):
        row = make_row(photographs, split, seed, index, evidence)
        row["images"] = [{"bytes": _png(image), "path": None} for image in row["images"]]
        for name, column in columns.items():
            column.append(row[name])
    return datasets.Dataset.from_dict(columns, features=_FEATURES, split=datasets.NamedSplit(split))


def draw_photos(
    split: str,
    num_images: int,
    seed: int = 0,
    folder: str | Path | None = None,
    evidence: Evidence | None = None,
) -> datasets.Dataset:
    """The same rows, each drawn on access: for training in any order.

    Raises:
        FileNotFoundError: the photographs were not built; with the command to build them.
        ValueError: there is no such split, or `num_images` is not positive.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; it must be at least 1.")
    load_photographs(split, folder)
    index = datasets.Dataset.from_dict({"index": list(range(num_images))}, split=datasets.NamedSplit(split))
    sizes = asdict(evidence or Evidence())
    return index.with_transform(partial(_drawn, split, seed, None if folder is None else str(folder), sizes))


def _drawn(split: str, seed: int, folder: str | None, sizes: dict[str, Any], batch: dict[str, list]) -> dict[str, list]:
    photographs, evidence = load_photographs(split, folder), Evidence(**sizes)
    rows = [make_row(photographs, split, seed, index, evidence) for index in batch["index"]]
    return {name: [row[name] for row in rows] for name in _FEATURES}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
