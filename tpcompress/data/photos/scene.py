"""Draw a scene: photographic cut-outs with coloured dots on a photographic background, and where everything lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from tpcompress.data.photos.catalogue import COLOURS
from tpcompress.data.photos.store import Photographs

SIDE, PATCH = 224, 14
GRID = SIDE // PATCH
Box = tuple[int, int, int, int]

_COVERED = 0.3
"""Share of a patch from which on it shows an item; of smaller items, the patches that they cover most."""

_OVERLAP = 0.03
"""Share of the smaller of two items that the other may hide."""


@dataclass(frozen=True)
class Evidence:
    """How large the parts of a scene are that answers rest on, as ranges in pixels; a patch has 14.

    Attributes:
        dot: diameter of a coloured dot.
        small: side of the smallest item (square root of its area).
        group: side of each of one to four items of one class.
        large: side of the other items.
    """

    dot: tuple[float, float] = (14, 18)
    small: tuple[float, float] = (26, 34)
    group: tuple[float, float] = (44, 60)
    large: tuple[float, float] = (60, 88)

    def __post_init__(self) -> None:
        for name, (low, high) in vars(self).items():
            if not 4 <= low <= high <= SIDE / 2:
                raise ValueError(f"{name} is a range of pixels within 4 and {SIDE // 2}, got {low} to {high}.")


@dataclass(frozen=True)
class Dot:
    """A coloured dot on an item: its centre in pixels and its patches, numbered row by row."""

    colour: str
    x: int
    y: int
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A cut-out: its class, its box (left, top, right, bottom) in pixels, its patches, and the dot on it."""

    name: str
    box: Box
    patches: tuple[int, ...]
    dot: Dot | None = None

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def area(self) -> int:
        """Area of the box, in pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


@dataclass(frozen=True)
class Layout:
    """What a scene shows, without its pixels. `group` is the class of which there may be several items."""

    place: str
    items: tuple[Item, ...]
    group: str


def draw_scene(rng: Random, photographs: Photographs, evidence: Evidence | None = None) -> tuple[np.ndarray, Layout]:
    """Draw one scene.

    Args:
        rng: source of all choices; the same state gives the same scene.
        photographs: those of the split.
        evidence: sizes of its parts; default: `Evidence()`.

    Returns:
        pixels (224, 224, 3) uint8, and the layout.
    """
    evidence = evidence or Evidence()
    place = rng.choice(sorted(photographs.places))
    image = _background(rng.choice(photographs.places[place]), rng)
    plan = _plan(rng, sorted(photographs.objects), evidence)
    colours = rng.sample(list(COLOURS), len(COLOURS))
    items: list[Item] = []
    shapes: list[np.ndarray] = []
    for name, side in sorted(plan, key=lambda part: -part[1]):  # the largest first: they are the hardest to place
        cutout = _turned(rng.choice(photographs.objects[name]), side, rng)
        box = _free_box(cutout.size, [item.box for item in items], rng)
        if box is None:
            continue
        image.paste(cutout.convert("RGB"), box[:2], cutout.getchannel("A"))
        mask = Image.new("L", (SIDE, SIDE))
        mask.paste(cutout.getchannel("A"), box[:2])
        items.append(Item(name, box, _patches(mask)))
        shapes.append(np.asarray(mask))
    for number, shape in enumerate(shapes):  # after all items, so that none hides a dot
        if items[number].area >= evidence.group[0] ** 2 and colours and rng.random() < 0.75:
            dot = _put_dot(image, shape, colours.pop(), rng.uniform(*evidence.dot), rng)
            items[number] = replace(items[number], dot=dot)
    return np.asarray(image).copy(), Layout(place, tuple(items), plan[0][0])


def _plan(rng: Random, names: list[str], evidence: Evidence) -> list[tuple[str, float]]:
    """Classes and sides of the items: a group first, then single items of other classes, mostly one small."""
    group, *others = rng.sample(names, min(len(names), rng.choice((3, 4))))
    plan = [(group, rng.uniform(*evidence.group)) for _ in range(rng.randint(1, 4))]
    for number, name in enumerate(others):
        small = number == 0 and rng.random() < 0.85
        plan.append((name, rng.uniform(*(evidence.small if small else evidence.large))))
    return plan


def _background(photograph: Image.Image, rng: Random) -> Image.Image:
    """A random square of the photograph, a little darker or lighter."""
    width, height = photograph.size
    side = min(width, height) * rng.uniform(0.7, 1.0)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    box = (int(left), int(top), int(left + side), int(top + side))
    square = photograph.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return ImageEnhance.Brightness(square).enhance(rng.uniform(0.75, 1.1))


def _turned(photograph: Image.Image, side: float, rng: Random) -> Image.Image:
    """The cut-out mirrored or not, slightly rotated, in other light, at a given side (square root of its area)."""
    if rng.random() < 0.5:
        photograph = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = photograph.rotate(rng.uniform(-18, 18), Image.Resampling.BICUBIC, expand=True)
    alpha = turned.getchannel("A")
    light = ImageEnhance.Color(turned.convert("RGB")).enhance(rng.uniform(0.6, 1.3))
    turned = ImageEnhance.Brightness(light).enhance(rng.uniform(0.75, 1.2))
    turned.putalpha(alpha)
    width, height = turned.size
    scale = min(side / (width * height) ** 0.5, 0.6 * SIDE / max(width, height))
    size = max(PATCH // 2, round(width * scale)), max(PATCH // 2, round(height * scale))
    return turned.resize(size, Image.Resampling.LANCZOS)


def _free_box(size: tuple[int, int], taken: list[Box], rng: Random) -> Box | None:
    width, height = size
    for _ in range(80):
        left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
        box = (left, top, left + width, top + height)
        if all(_common(box, other) <= _OVERLAP * min(_area(box), _area(other)) for other in taken):
            return box
    return None


def _common(one: Box, other: Box) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _put_dot(image: Image.Image, shape: np.ndarray, colour: str, diameter: float, rng: Random) -> Dot | None:
    """Draw a dot with its centre on the item; None where the item has no opaque place for it."""
    margin = int(diameter / 2) + 1
    rows, columns = np.nonzero(shape[margin:-margin, margin:-margin] > 200)
    if not len(rows):
        return None
    pick = rng.randrange(len(rows))
    x, y = int(columns[pick]) + margin, int(rows[pick]) + margin
    ring = (x - diameter / 2, y - diameter / 2, x + diameter / 2, y + diameter / 2)
    ImageDraw.Draw(image).ellipse(ring, fill=COLOURS[colour], outline=(20, 20, 20))
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse(ring, fill=255)
    return Dot(colour, x, y, _patches(mask))


def _patches(mask: Image.Image) -> tuple[int, ...]:
    """Patches that a mask covers."""
    share = np.asarray(mask, np.float32).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).reshape(-1) / 255
    found: Iterable[int] = np.flatnonzero(share >= min(_COVERED, 0.8 * float(share.max())))
    return tuple(int(patch) for patch in found)
