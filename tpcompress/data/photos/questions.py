"""Ask about a scene: closed families with one-word answers, and the patches that the answer rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from tpcompress.data.photos.catalogue import CELLS, COLOURS, COUNTS, OBJECTS, PLACES, SIDES
from tpcompress.data.photos.scene import GRID, SIDE, Item, Layout

_MARGIN = 8
"""Pixels between a centre and the next cell from which on a position is asked for: nearer ones are debatable."""

_SMALLER = 1.6
"""By how much the smallest item has to be smaller in area than the next."""

_ASIDE = 1.5
"""How much longer one axis of the way between two items has to be for a relation."""


@dataclass(frozen=True)
class Question:
    """One question with its only right answer.

    Attributes:
        family: one of `FAMILIES`.
        text: words separated by spaces.
        answer: one word.
        evidence: patches of what is asked about, most needed first.
        leaks: the evidence could not be found from the question alone: choosing it uses the answer.
    """

    family: str
    text: str
    answer: str
    evidence: tuple[int, ...]
    leaks: bool


def ask(layout: Layout, rng: Random, most: int = 2) -> list[Question]:
    """Questions about a scene, family by family: at most `most` of each, drawn by `rng` from all that are possible."""
    asked: list[Question] = []
    for family in _ASK.values():
        possible = list(family(layout, rng))
        asked += possible if len(possible) <= most else rng.sample(possible, most)
    return asked


def cell_of(x: float, y: float) -> int:
    """The cell of a point in pixels."""
    return int(y * 3 // SIDE) * 3 + int(x * 3 // SIDE)


def _scene(layout: Layout, rng: Random) -> Iterator[Question]:
    shown = {patch for item in layout.items for patch in item.patches}
    free = tuple(patch for patch in range(GRID * GRID) if patch not in shown)
    yield Question("scene", "what place", layout.place, free, False)


def _exist(layout: Layout, rng: Random) -> Iterator[Question]:
    """One class that is there and one that is not."""
    there = sorted({item.name for item in layout.items})
    absent = [name for name in OBJECTS if name not in there]
    if there and absent:
        present = rng.choice(there)
        yield Question("exist", f"any {present}", "yes", _patches_of(layout, present), True)
        yield Question("exist", f"any {rng.choice(absent)}", "no", (), True)


def _where(layout: Layout, rng: Random) -> Iterator[Question]:
    for item in _single(layout):
        if _is_clear(*item.centre):
            yield Question("where", f"where {item.name}", CELLS[cell_of(*item.centre)], item.patches, False)


def _cell(layout: Layout, rng: Random) -> Iterator[Question]:
    """Cells with the centre of one item, and of no other near its borders."""
    by_cell: dict[int, list[Item]] = {}
    for item in layout.items:
        by_cell.setdefault(cell_of(*item.centre), []).append(item)
    for cell, items in sorted(by_cell.items()):
        if len(items) == 1 and _is_clear(*items[0].centre):
            yield Question("cell", f"what at {CELLS[cell]}", items[0].name, items[0].patches, True)


def _colour(layout: Layout, rng: Random) -> Iterator[Question]:
    for item in _single(layout):
        if item.dot is not None:
            text = f"colour on {item.name}"
            yield Question("colour", text, item.dot.colour, item.dot.patches + item.patches, False)


def _holder(layout: Layout, rng: Random) -> Iterator[Question]:
    for item in layout.items:
        if item.dot is not None:
            text = f"what under {item.dot.colour}"
            yield Question("holder", text, item.name, item.dot.patches + item.patches, False)


def _dot(layout: Layout, rng: Random) -> Iterator[Question]:
    for item in layout.items:
        if item.dot is not None and _is_clear(item.dot.x, item.dot.y):
            cell = CELLS[cell_of(item.dot.x, item.dot.y)]
            yield Question("dot", f"where {item.dot.colour}", cell, item.dot.patches, False)


def _small(layout: Layout, rng: Random) -> Iterator[Question]:
    ordered = sorted(layout.items, key=lambda item: item.area)
    if len(ordered) > 1 and ordered[0].area * _SMALLER < ordered[1].area:
        yield Question("small", "what smallest", ordered[0].name, ordered[0].patches, True)


def _count(layout: Layout, rng: Random) -> Iterator[Question]:
    number = sum(item.name == layout.group for item in layout.items)
    if number:
        yield Question("count", f"count {layout.group}", COUNTS[number - 1], _patches_of(layout, layout.group), False)


def _relation(layout: Layout, rng: Random) -> Iterator[Question]:
    """On which side of one item another one is."""
    single = _single(layout)
    for item in single:
        for other in single:
            across, down = (a - b for a, b in zip(item.centre, other.centre, strict=True))
            if item is other or max(abs(across), abs(down)) < SIDE / 6:
                continue
            if not (abs(across) > _ASIDE * abs(down) or abs(down) > _ASIDE * abs(across)):
                continue
            side = (across > 0) if abs(across) > abs(down) else 2 + (down > 0)
            text, patches = f"side of {item.name} from {other.name}", item.patches + other.patches
            yield Question("relation", text, SIDES[int(side)], patches, False)


def _single(layout: Layout) -> list[Item]:
    """Items of classes that occur once."""
    number = Counter(item.name for item in layout.items)
    return [item for item in layout.items if number[item.name] == 1]


def _patches_of(layout: Layout, name: str) -> tuple[int, ...]:
    return tuple(patch for item in layout.items if item.name == name for patch in item.patches)


def _is_clear(x: float, y: float) -> bool:
    """Whether a point is far enough from the borders between cells."""
    lines = (SIDE / 3, 2 * SIDE / 3)
    return all(abs(value - line) >= _MARGIN for value in (x, y) for line in lines)


_ASK: Final[dict[str, Callable[[Layout, Random], Iterator[Question]]]] = {
    "scene": _scene,
    "exist": _exist,
    "where": _where,
    "cell": _cell,
    "colour": _colour,
    "holder": _holder,
    "dot": _dot,
    "small": _small,
    "count": _count,
    "relation": _relation,
}

FAMILIES: Final = tuple(_ASK)
ONE_PATCH: Final = ("colour", "holder", "dot")
"""Families whose answer rests on a dot of about one patch."""

_WORDS_OF_QUESTIONS = "what place any where at colour on under smallest count side of from"
WORDS: Final = tuple(
    dict.fromkeys((*_WORDS_OF_QUESTIONS.split(), *OBJECTS, *COLOURS, *PLACES, *CELLS, *SIDES, *COUNTS, "yes", "no"))
)
"""All words of questions and answers."""
