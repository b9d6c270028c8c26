"""Render an image specification to pixels: 96x96, in 12x12 patches of 8 pixels."""

from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tpcompress.data.benchmark.digits import digit_sample
from tpcompress.data.benchmark.symbolic import Bar, Card, Field, ImageSpec, Item, Shape, Tag
from tpcompress.data.benchmark.vocabulary import COLOURS, DIGITS, IMAGE_SIZE, LETTERS, PATCH

FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf")
_INK = (15, 15, 15)


def render(spec: ImageSpec, rng: Random, split: str) -> np.ndarray:
    """Render an image.

    Args:
        spec: specification of the image.
        rng: generator for tints, phases, fonts and sensor noise.
        split: split whose handwritten digits are used.

    Returns:
        uint8 (96, 96, 3): RGB pixels.
    """
    canvas = _background(spec, rng)
    font = rng.choice(FONTS)
    for item in spec.items:
        if isinstance(item, Card):
            _draw_card(canvas, item, rng, split)
        else:
            _draw(canvas, item, font)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 5, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return (canvas + noise).clip(0, 255).astype(np.uint8)


def _background(spec: ImageSpec, rng: Random) -> np.ndarray:
    if spec.kind == "scene":
        base = np.array([rng.uniform(50, 130) for _ in range(3)], np.float32)
        pattern = _pattern(spec.texture, rng.randrange(PATCH // 2))[..., None]
        return base + pattern * (rng.choice((-1, 1)) * rng.uniform(25, 40))
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.uniform(205, 250), np.float32)
    if spec.kind == "chart":
        canvas[::PATCH] -= 25
    return canvas


@cache
def _pattern(texture: str, phase: int) -> np.ndarray:
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + phase
    half = PATCH // 2
    patterns = {
        "plain": rows * 0,
        "stripes": columns // half % 2,
        "checks": (columns // half + rows // half) % 2,
        "dots": (columns % PATCH - half) ** 2 + (rows % PATCH - half) ** 2 < 6,
    }
    return patterns[texture].astype(np.float32)


def _draw(canvas: np.ndarray, item: Item, font: str) -> None:
    colour = COLOURS[item.colour]
    match item:
        case Shape():
            _paste(canvas, _shape_mask(item.name), item.column, item.row, colour)
        case Tag():
            _fill(canvas, item.column, item.row, 1, colour)
            _paste(canvas, _glyph_mask(font, item.letter), item.column, item.row, _INK)
        case Field():
            _fill(canvas, item.column, item.row, 1, colour)
            for i, glyph in enumerate(item.characters):
                _paste(canvas, _glyph_mask(font, glyph), item.column + 1 + i, item.row, _INK)
        case Bar():
            left = item.column * PATCH
            canvas[IMAGE_SIZE - PATCH * item.value :, left + 1 : left + PATCH - 1] = colour


def _draw_card(canvas: np.ndarray, card: Card, rng: Random, split: str) -> None:
    """Draw a card with a handwritten digit at twice its size; training digits are also rotated, sheared and shifted."""
    _fill(canvas, card.column, card.row, 2, COLOURS[card.colour])
    sample = Image.fromarray((digit_sample(split, card.digit, card.pick) * 255).astype(np.uint8))
    amount = 1.0 if split == "train" else 0.0
    turn, slant, zoom, right, down = (amount * rng.uniform(-1, 1) for _ in range(5))
    a, b = 0.5 * (1 + 0.12 * zoom), 0.5 * (0.15 * turn + 0.15 * slant)
    d, e = 0.5 * -0.15 * turn, 0.5 * (1 + 0.12 * zoom)
    # The affine map from the 16x16 card to the 8x8 sample preserves the centre.
    offsets = (4 - 8 * (a + b) + 0.6 * right, 4 - 8 * (d + e) + 0.6 * down)
    size, bilinear = (2 * PATCH, 2 * PATCH), Image.Resampling.BILINEAR
    ink = sample.transform(size, Image.Transform.AFFINE, (a, b, offsets[0], d, e, offsets[1]), bilinear)
    _paste(canvas, _as_mask(ink), card.column, card.row, _INK)


def _fill(canvas: np.ndarray, column: int, row: int, side: int, colour: tuple[int, int, int]) -> None:
    canvas[row * PATCH : (row + side) * PATCH, column * PATCH : (column + side) * PATCH] = colour


def _paste(canvas: np.ndarray, mask: np.ndarray, column: int, row: int, colour: tuple[int, int, int]) -> None:
    """Blend a colour in by a mask (H, W) whose top left corner is at a patch."""
    height, width = mask.shape
    area = canvas[row * PATCH : row * PATCH + height, column * PATCH : column * PATCH + width]
    area += (np.array(colour, np.float32) - area) * mask[..., None]


@cache
def _shape_mask(name: str) -> np.ndarray:
    """Antialiased mask of a shape over 2x2 patches, drawn at eight times the size and averaged."""
    side, size = 2 * PATCH, 16 * PATCH
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    end, middle = size - 1, size / 2
    match name:
        case "square":
            draw.rectangle((size * 0.06, size * 0.06, size * 0.94, size * 0.94), fill=255)
        case "triangle":
            draw.polygon(((middle, 0), (size, size), (0, size)), fill=255)
        case "diamond":
            draw.polygon(((middle, 0), (size, middle), (middle, size), (0, middle)), fill=255)
        case "cross":
            draw.rectangle((size * 0.35, 0, size * 0.65, size), fill=255)
            draw.rectangle((0, size * 0.35, size, size * 0.65), fill=255)
        case _:  # circle and ring
            draw.ellipse((0, 0, end, end), fill=255)
            if name == "ring":
                draw.ellipse((size * 0.27, size * 0.27, size * 0.73, size * 0.73), fill=0)
    return _as_mask(image.resize((side, side), Image.Resampling.BOX))


@cache
def _glyph_mask(font: str, glyph: str) -> np.ndarray:
    # matplotlib ships the DejaVu fonts; imported here because rendering alone needs it.
    import matplotlib

    if glyph not in DIGITS + LETTERS:
        raise ValueError(f"No glyph {glyph!r}; the benchmark uses only {''.join(DIGITS + LETTERS)}.")
    truetype = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{font}", 9)
    image = Image.new("L", (PATCH, PATCH))
    ImageDraw.Draw(image).text((PATCH / 2, PATCH / 2), glyph, font=truetype, fill=255, anchor="mm")
    return _as_mask(image)


def _as_mask(image: Image.Image) -> np.ndarray:
    mask = np.asarray(image, np.float32) / 255
    mask.setflags(write=False)
    return mask
