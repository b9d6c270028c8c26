"""Cache the tower's features of scenes in shards: `features/SPLIT-SEED/000000.safetensors`, layouts beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Model

from photos.tower import features_of
from tpcompress.data.photos.builder import scene_of
from tpcompress.data.photos.scene import Dot, Item, Layout
from tpcompress.data.photos.store import Photographs
from tpcompress.files import atomic_path, write_atomic

SHARD = 200
"""Scenes of a shard: 40 MB of features."""

_BATCH = 8


def extract(
    tower: Dinov2Model, photographs: Photographs, split: str, seed: int, scenes: int, out: Path, console: Console
) -> None:
    """Write the missing shards of the first scenes of a split.

    Args:
        tower: DINOv2, in the dtype to compute in.
        scenes: number of scenes; a multiple of the shard's size, or the last shard is short.
    """
    folder = feature_folder(out, split, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, scenes, SHARD):
        count = min(SHARD, scenes - start)
        path = folder / f"{start:06d}.safetensors"
        if path.is_file() and len(json.loads(path.with_suffix(".json").read_text("utf-8"))) >= count:
            continue
        features, layouts = [], []
        for first in range(start, start + count, _BATCH):
            numbers = range(first, min(first + _BATCH, start + count))
            drawn = [scene_of(photographs, split, seed, number) for number in numbers]
            features.append(features_of(tower, [pixels for pixels, _, _ in drawn]))
            layouts += [asdict(layout) for _, layout, _ in drawn]
        write_atomic(path.with_suffix(".json"), json.dumps(layouts))
        with atomic_path(path) as part:
            save_file({"features": torch.cat(features)}, part)
        console.print(f"{split}: features of {start + count} of {scenes} scenes")


def feature_folder(out: Path, split: str, seed: int) -> Path:
    """Folder of the features of a split."""
    return out / "features" / f"{split}-{seed}"


def load_features(out: Path, split: str, seed: int, scenes: int) -> tuple[Tensor, list[Layout]]:
    """Features (N, 256, 384) float16 and layouts of the first scenes.

    Raises:
        FileNotFoundError: fewer scenes were extracted.
    """
    folder = feature_folder(out, split, seed)
    features: list[Tensor] = []
    layouts: list[Layout] = []
    for start in range(0, scenes, SHARD):
        path = folder / f"{start:06d}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has features of {start} scenes of {scenes}; run the build again.")
        count = min(SHARD, scenes - start)
        features.append(load_file(path)["features"][:count])
        layouts += [_layout(record) for record in json.loads(path.with_suffix(".json").read_text("utf-8"))[:count]]
    return torch.cat(features), layouts


def _layout(record: dict[str, Any]) -> Layout:
    items = []
    for item in record["items"]:
        dot = item["dot"]
        dot = None if dot is None else Dot(dot["colour"], dot["x"], dot["y"], tuple(dot["patches"]))
        items.append(Item(item["name"], tuple(item["box"]), tuple(item["patches"]), dot))
    return Layout(record["place"], tuple(items), record["group"])
