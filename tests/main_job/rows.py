"""A data file with every kind of row that the processor of a family takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tpcompress.families import Family
from tpcompress.families.catalogue import facts

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}

SINGLE = (("red", 40, 30), ("green", 64, 20), ("blue", 90, 90), ("red", 30, 50), ("blue", 20, 70))
"""Colour, width and height of the images of rows with one."""


def save_rows(folder: Path, family: Family) -> Path:
    """Write ten rows: one image of several sizes, and two images, text, turns and videos where the family has them."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def picture(name: str, colour: str, size: tuple[int, int]) -> str:
        frames = [_drawn(draw, colour, size) for _ in range(4 if name.endswith(".gif") else 1)]
        frames[0].save(folder / name, save_all=len(frames) > 1, append_images=frames[1:], duration=500)
        return name

    rows: list[dict[str, Any]] = [
        _row("what colour is this?", colour, image=picture(f"{number}.png", colour, size))
        for number, (colour, size) in enumerate(
            zip(
                ["red", "green", "blue", "red", "blue"], [(40, 30), (64, 20), (90, 90), (30, 50), (20, 70)], strict=True
            )
        )
    ]
    if "images" in family.takes:
        for number in (0, 1):
            names = [picture(f"a{number}.png", "red", (50, 40)), picture(f"b{number}.png", "blue", (30, 60))]
            rows.append(_row("which one is blue?", "the second", image=names))
    if "text" in family.takes:
        rows.append(_row("how many legs has a spider?", "eight"))
    if "turns" in family.takes:
        rows.append(_row("what colour?", "green", "sure?", "yes", image=picture("t.png", "green", (48, 48))))
    if facts(family)["video"] != "-" and facts(family)["batch"] == "yes":
        rows.append(_row("what colour is the film?", "red", video=picture("v.gif", "red", (40, 30))))
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def _drawn(draw: np.random.Generator, colour: str, size: tuple[int, int]) -> Image.Image:
    noise = draw.integers(-25, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(noise + np.array(COLOURS[colour]), 1, 254).astype(np.uint8))


def _row(*texts: str, image: str | list[str] | None = None, video: str | None = None) -> dict[str, Any]:
    marks = "<image>\n" * (len(image) if isinstance(image, list) else int(image is not None)) + "<video>\n" * bool(
        video
    )
    turns = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
    turns[0]["value"] = marks + turns[0]["value"]
    row: dict[str, Any] = {"conversations": turns}
    return row | ({"image": image} if image else {}) | ({"video": video} if video else {})
