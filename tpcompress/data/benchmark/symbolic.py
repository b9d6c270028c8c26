"""Draw image specifications: the items of an image, the questions about them, and per-patch labels, without pixels.

A specification depends on a `random.Random` alone. With specifications, tests can derive the answers independently,
and a language model can be trained before a vision tower exists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from tpcompress.data.benchmark.vocabulary import (
    COLOURS,
    DIGITS,
    FIELD_LENGTH,
    GRID,
    KEY_COLOURS,
    LETTERS,
    MAX_BAR,
    PLURALS,
    SHAPES,
    TEXTURES,
)

Kind = Literal["scene", "document", "chart", "digits"]
Cell = tuple[int, int]
KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_SHARES = (0.5, 0.2, 0.15, 0.15)


@dataclass(frozen=True)
class Question:
    """One question of a family with its only correct answer; both are words separated by spaces."""

    family: str
    text: str
    answer: str


@dataclass(frozen=True)
class Shape:
    """A coloured shape over 2x2 patches; `column` and `row` are those of its top left patch."""

    name: str
    colour: str
    column: int
    row: int


@dataclass(frozen=True)
class Tag:
    """A coloured tag of one patch with a letter."""

    colour: str
    letter: str
    column: int
    row: int


@dataclass(frozen=True)
class Field:
    """A line of a document: a coloured key patch at `column`, and its characters in the patches to the right."""

    colour: str
    characters: tuple[str, ...]
    column: int
    row: int


@dataclass(frozen=True)
class Bar:
    """A bar of a chart, `value` patches high, on the lower border."""

    colour: str
    value: int
    column: int


@dataclass(frozen=True)
class Card:
    """A coloured card over 2x2 patches with a handwritten digit; `pick` in [0, 1) selects the sample."""

    colour: str
    digit: str
    pick: float
    column: int
    row: int


Item = Shape | Tag | Field | Bar | Card


@dataclass(frozen=True)
class ImageSpec:
    """Specification of an image.

    Attributes:
        texture: background of a scene; empty for the other kinds.
    """

    kind: Kind
    texture: str
    items: tuple[Item, ...]
    questions: tuple[Question, ...]


def draw_image_spec(rng: Random, kind: Kind | None = None, limit: int = 2) -> ImageSpec:
    """Draw the specification of an image.

    Args:
        rng: the only source of randomness.
        kind: kind of image; drawn with the probabilities `KIND_SHARES` if None.
        limit: maximum number of questions per family.
    """
    kind = kind or rng.choices(KINDS, KIND_SHARES)[0]
    generators: dict[Kind, Callable[[Random, int], ImageSpec]] = {
        "scene": _scene,
        "document": _document,
        "chart": _chart,
        "digits": _digits,
    }
    return generators[kind](rng, limit)


def patch_labels(spec: ImageSpec) -> tuple[dict[Cell, list[str]], list[str]]:
    """Object-level labels of the patches of an image.

    Returns:
        labels of each patch (column, row) that an item covers, and the labels of all other patches.
    """
    tallest = max((item.value for item in spec.items if isinstance(item, Bar)), default=0)
    labels: dict[Cell, list[str]] = {}
    for item in spec.items:
        labels.update(_item_labels(item, tallest))
    return labels, [f"texture:{spec.texture}"] if spec.texture else ["page"]


def _item_labels(item: Item, tallest: int) -> dict[Cell, list[str]]:
    colour = f"colour:{item.colour}"
    match item:
        case Shape():
            labels = [f"shape:{item.name}", colour, f"column:{item.column}", f"row:{item.row}"]
            return dict.fromkeys(_square(item.column, item.row), labels)
        case Card():
            return dict.fromkeys(_square(item.column, item.row), [f"digit:{item.digit}", colour, "card"])
        case Tag():
            return {(item.column, item.row): [colour, f"glyph:{item.letter}", "tag"]}
        case Bar():
            labels = [colour, f"value:{item.value}", "bar"] + ["tallest"] * (item.value == tallest)
            return {(item.column, GRID - 1 - height): labels for height in range(item.value)}
        case Field():
            cells = {(item.column, item.row): [colour, "key"]}
            for i, glyph in enumerate(item.characters):
                cells[item.column + 1 + i, item.row] = [f"glyph:{glyph}", f"field:{item.colour}", f"place:{i}"]
            return cells


def _square(column: int, row: int, side: int = 2) -> list[Cell]:
    return [(column + i, row + j) for j in range(side) for i in range(side)]


def _place(rng: Random, taken: set[Cell], side: int) -> Cell:
    """Draw a free square of patches; the items never fill the grid."""
    while True:
        column, row = rng.randrange(GRID - side + 1), rng.randrange(GRID - side + 1)
        if taken.isdisjoint(cells := _square(column, row, side)):
            taken.update(cells)
            return column, row


def _scene(rng: Random, limit: int) -> ImageSpec:
    taken: set[Cell] = set()
    shapes: list[Shape] = []
    # Shapes repeat with different probabilities: without repetition nearly every count is 1; with too much of it few
    # shapes are unique.
    repeat = rng.choice((0.0, 0.3, 0.6))
    for _ in range(rng.randint(3, 5)):
        name = rng.choice(shapes).name if shapes and rng.random() < repeat else rng.choice(SHAPES)
        shapes.append(Shape(name, rng.choice(list(COLOURS)), *_place(rng, taken, 2)))
    tags = [Tag(colour, rng.choice(LETTERS), *_place(rng, taken, 1)) for colour in rng.sample(KEY_COLOURS, 3)]
    texture = rng.choice(TEXTURES)
    questions = [
        Question("scene", "what is the background ?", texture),
        *_ground_questions(rng, shapes, limit),
        *_count_questions(rng, shapes, limit),
        *_needle_questions(rng, tags, limit),
        *_exist_questions(rng, shapes, limit),
        *_attr_questions(rng, shapes, limit),
    ]
    return ImageSpec("scene", texture, (*shapes, *tags), tuple(questions))


def _ground_questions(rng: Random, shapes: list[Shape], limit: int) -> list[Question]:
    """Questions about shapes that are alone in their column, so that either word of the answer identifies the shape."""
    pairs, columns = [(shape.name, shape.colour) for shape in shapes], [shape.column for shape in shapes]
    unique = [s for s in shapes if pairs.count((s.name, s.colour)) == 1 and columns.count(s.column) == 1]
    return [
        Question("ground", f"where is the {shape.colour} {shape.name} ?", f"<x{shape.column}> <y{shape.row}>")
        for shape in rng.sample(unique, min(limit, len(unique)))
    ]


def _count_questions(rng: Random, shapes: list[Shape], limit: int) -> list[Question]:
    """Questions with different counts where possible, so that no single answer is a good guess."""
    names = [shape.name for shape in shapes]
    order = rng.sample(SHAPES, len(SHAPES))
    chosen = list({names.count(name): name for name in order}.values())
    # An absent shape comes last and not always, because "0" is as easy to answer as "no".
    chosen.sort(key=lambda name: (names.count(name) == 0, rng.random()))
    if names.count(chosen[-1]) == 0 and len(chosen) > 1 and rng.random() < 0.4:
        chosen.pop()
    return [Question("count", f"how many {PLURALS[name]} ?", str(names.count(name))) for name in chosen[:limit]]


def _needle_questions(rng: Random, tags: list[Tag], limit: int) -> list[Question]:
    asked = rng.sample(tags, min(limit, len(tags)))
    return [Question("needle", f"what letter is on the {tag.colour} tag ?", tag.letter) for tag in asked]


def _exist_questions(rng: Random, shapes: list[Shape], limit: int) -> list[Question]:
    """Yes and no are equally likely; for four of five absent pairs, shape and colour each occur in the image."""
    present = sorted({(shape.colour, shape.name) for shape in shapes})
    absent = [(colour, name) for colour in COLOURS for name in SHAPES if (colour, name) not in present]
    colours, names = {colour for colour, _ in present}, {name for _, name in present}
    hard = [pair for pair in absent if pair[0] in colours and pair[1] in names]
    questions: dict[str, Question] = {}
    for _ in range(limit):
        answer = rng.choice(("yes", "no"))
        colour, name = rng.choice(present if answer == "yes" else hard if hard and rng.random() < 0.8 else absent)
        text = f"is there a {colour} {name} ?"
        questions[text] = Question("exist", text, answer)
    return list(questions.values())


def _attr_questions(rng: Random, shapes: list[Shape], limit: int) -> list[Question]:
    names = [shape.name for shape in shapes]
    unique = [shape for shape in shapes if names.count(shape.name) == 1]
    asked = rng.sample(unique, min(limit, len(unique)))
    return [Question("attr", f"what colour is the {shape.name} ?", shape.colour) for shape in asked]


def _document(rng: Random, limit: int) -> ImageSpec:
    size = rng.randint(3, 4)
    fields = [
        Field(colour, tuple(rng.choices(DIGITS + LETTERS, k=FIELD_LENGTH)), rng.randrange(GRID - FIELD_LENGTH), row)
        for colour, row in zip(rng.sample(KEY_COLOURS, size), rng.sample(range(GRID), size), strict=True)
    ]
    asked = rng.sample(fields, min(limit, size))
    questions = [Question("ocr", f"read the {field.colour} field ?", " ".join(field.characters)) for field in asked]
    return ImageSpec("document", "", tuple(fields), tuple(questions))


def _chart(rng: Random, limit: int) -> ImageSpec:
    size = rng.randint(3, 4)
    columns, values = rng.sample(range(GRID), size), rng.sample(range(1, MAX_BAR + 1), size)
    bars = [Bar(*bar) for bar in zip(rng.sample(KEY_COLOURS, size), values, columns, strict=True)]
    tallest = max(bars, key=lambda bar: bar.value)
    questions = [Question("chart", "what colour is the tallest bar ?", tallest.colour)]
    for bar in bars:
        questions.append(Question("chart", f"what is the value of the {bar.colour} bar ?", str(bar.value)))
    return ImageSpec("chart", "", tuple(bars), tuple(rng.sample(questions, min(limit, len(questions)))))


def _digits(rng: Random, limit: int) -> ImageSpec:
    taken: set[Cell] = set()
    cards = [
        Card(colour, rng.choice(DIGITS), rng.random(), *_place(rng, taken, 2))
        for colour in rng.sample(KEY_COLOURS, rng.randint(2, 4))
    ]
    asked = rng.sample(cards, min(limit, len(cards)))
    questions = [Question("digits", f"what digit is on the {card.colour} card ?", card.digit) for card in asked]
    return ImageSpec("digits", "", tuple(cards), tuple(questions))
