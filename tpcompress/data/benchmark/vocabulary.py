"""Words, colours, shapes and patch labels of the procedural benchmark.

The vocabulary is closed: every question and answer consists of words in `WORDS`, separated by single spaces, so that a
word-level tokenizer with this list has no unknown words.
"""

from typing import Final

GRID: Final = 12
PATCH: Final = 8
IMAGE_SIZE: Final = GRID * PATCH

FAMILIES: Final = ("scene", "attr", "exist", "count", "needle", "chart", "ocr", "ground", "digits")

COLOURS: Final = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (160, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 225),
    "white": (245, 245, 245),
}
# White is invisible on the background of documents, charts and cards, so only shapes use it.
KEY_COLOURS: Final = tuple(colour for colour in COLOURS if colour != "white")
PLURALS: Final = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "ring": "rings",
    "diamond": "diamonds",
}
SHAPES: Final = tuple(PLURALS)
TEXTURES: Final = ("plain", "stripes", "dots", "checks")
LETTERS: Final = tuple("ACEHKLPTUX")
DIGITS: Final = tuple("0123456789")
COLUMNS: Final = tuple(f"<x{i}>" for i in range(GRID))
ROWS: Final = tuple(f"<y{i}>" for i in range(GRID))
FIELD_LENGTH: Final = 3
MAX_BAR: Final = 8

PAD, BOS, EOS, IMAGE, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")

_QUESTION_WORDS = (
    "? where is the how many what letter on tag background colour bar value of tallest field there a read digit card"
)

WORDS: Final = (
    *SPECIAL_TOKENS,
    *_QUESTION_WORDS.split(),
    *COLOURS,
    *SHAPES,
    *PLURALS.values(),
    *TEXTURES,
    *LETTERS,
    *DIGITS,
    "yes",
    "no",
    *COLUMNS,
    *ROWS,
)

# Object-level label of a patch -> the word with the same meaning (None: no single word). Every patch of an object has
# the labels that questions about the *whole* object need, so that any of its patches is sufficient for the answer.
LABELS: Final = {
    **{f"shape:{shape}": shape for shape in SHAPES},
    **{f"colour:{colour}": colour for colour in COLOURS},
    **{f"glyph:{glyph}": glyph for glyph in DIGITS + LETTERS},
    **{f"texture:{texture}": texture for texture in TEXTURES},
    **{f"column:{i}": word for i, word in enumerate(COLUMNS)},
    **{f"row:{i}": word for i, word in enumerate(ROWS)},
    **{f"field:{colour}": colour for colour in KEY_COLOURS},
    **{f"place:{i}": None for i in range(FIELD_LENGTH)},
    **{f"value:{i}": str(i) for i in range(1, MAX_BAR + 1)},
    **{f"digit:{digit}": digit for digit in DIGITS},
    "tallest": "tallest",
    "tag": "tag",
    "bar": "bar",
    "key": "field",
    "card": "card",
    "page": None,
}
