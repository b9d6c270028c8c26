"""A data file about crops of bundled photographs: which subject is in the photograph, and is it a given one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

PHOTOS = {
    "woman": data.astronaut,
    "cat": data.chelsea,
    "cup": data.coffee,
    "rocket": data.rocket,
    "temple": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
}
"""Photographs by what they show."""


def crops(number: int, size: int = 112) -> Iterator[tuple[str, Image.Image]]:
    """Crops of all photographs in turns, each from another place, with what the photograph shows."""
    photos = {name: Image.fromarray(load()).convert("RGB") for name, load in PHOTOS.items()}
    for index in range(number):
        name = list(photos)[index % len(photos)]
        photo, turn = photos[name], index // len(photos)
        side = int(min(photo.size) * (0.6 + 0.05 * (turn % 4)))
        left = (photo.width - side) * (turn % 3) // 2
        top = (photo.height - side) * (turn // 3 % 3) // 2
        yield name, photo.crop((left, top, left + side, top + side)).resize((size, size))


def save_photos(folder: Path, number: int = 40) -> Path:
    """Write the crops and a data file of one record per crop, and return the file."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index, (name, image) in enumerate(crops(number)):
        image.save(folder / f"images/{index:02d}.jpg")
        messages = [
            {"role": "user", "content": "<image>\nwhat is this ?"},
            {"role": "assistant", "content": name},
        ]
        records.append({"id": str(index), "image": f"images/{index:02d}.jpg", "messages": messages})
    path = folder / "photos.json"
    path.write_text(json.dumps(records))
    return path
