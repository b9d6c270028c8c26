"""Contact sheet of retained tokens: a row per image, a column per rule, in bands of equal width.

It is drawn pixel by pixel and not by matplotlib, which takes minutes for hundreds of panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tpcompress.evaluation.figures.canvas import dimmed
from tpcompress.evaluation.figures.retained import Retained

CELL = 168
"""Pixels of the longer side of a panel."""
GAP = 8
COLUMNS = 9
"""Maximum number of rules in a band."""
TEXT = 13
"""Font size of the headings."""
LINE = TEXT + 4
EDGE = np.array([1.0, 0.84, 0.04])
"""Colour of the lines between merged cells."""
INK, GREY = (20, 20, 20), (110, 110, 110)


def contact_sheet(bands: Mapping[str, Mapping[str, Sequence[Retained]]], path: str | Path) -> None:
    """Draw the retained tokens of the same images under many rules.

    Args:
        bands: samples of every image by rule, by heading (one per budget). A second line of a rule's name, after a
            line break, is drawn in grey.
        path: output image; its folder is created.

    Raises:
        ValueError: nothing to draw, or rules with different numbers of images.
    """
    lengths = {len(samples) for rules in bands.values() for samples in rules.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"Every rule needs the same images, at least one; got {sorted(lengths) or 'no rule'}.")
    strips = []
    for heading, rules in bands.items():
        names = list(rules)
        for start in range(0, len(names), COLUMNS):
            more = " (continued)" if start else ""
            strips.append(_band(heading + more, {name: rules[name] for name in names[start : start + COLUMNS]}))
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _band(heading: str, rules: Mapping[str, Sequence[Retained]]) -> Image.Image:
    """One heading, the image column, and a column for each rule."""
    first = next(iter(rules.values()))
    plain = [_panel(sample.image, None) for sample in first]
    columns = {f"image\n{_total(first)}": plain} | {
        name: [_drawn(sample) for sample in samples] for name, samples in rules.items()
    }
    heights = [max(column[row].height for column in columns.values()) for row in range(len(plain))]
    font, bold = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT + 3)
    above = 2 * LINE + 2 * GAP + LINE
    size = (GAP + (CELL + GAP) * len(columns), above + sum(heights) + (GAP + LINE) * len(heights) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), heading, INK, bold)
    for number, (name, panels) in enumerate(columns.items()):
        left, top = GAP + number * (CELL + GAP), above
        for line, (words, colour) in enumerate(zip(name.split("\n"), (INK, GREY), strict=False)):
            pen.text((left, GAP + LINE * (line + 1) + GAP), _shortened(words, font, CELL), colour, font)
        for row, panel in enumerate(panels):
            sheet.paste(panel, (left, top))
            words = first[row].question if number == 0 else _count(list(rules.values())[number - 1][row])
            pen.text((left, top + heights[row] + 1), _shortened(words, font, CELL), GREY, font)
            top += heights[row] + GAP + LINE
    return sheet


def _drawn(sample: Retained) -> Image.Image:
    """The panel of one image under one rule; an overview is drawn beside the tiles at a third of their size."""
    if sample.overview is None:
        return _part(sample, CELL)
    small = _part(sample.overview, CELL // 3)
    tiles = _part(sample, CELL - small.width - 2)
    both = Image.new("RGB", (CELL, max(small.height, tiles.height)), "white")
    both.paste(small, (0, 0))
    both.paste(tiles, (small.width + 2, 0))
    return both


def _part(sample: Retained, side: int) -> Image.Image:
    """An image with dropped tokens in a pale grey, or with lines between merged cells."""
    if sample.cells is None:
        return _panel(sample.image, sample.keep, side)
    return _panel(_outlined(sample.image, sample.cells, side), None, side)


def _panel(pixels: np.ndarray, keep: np.ndarray | None, side: int = CELL) -> Image.Image:
    """An image with dropped tokens in a pale grey, `side` pixels wide or high."""
    rows, cols = pixels.shape[:2] if keep is None else keep.shape
    scale = side / max(pixels.shape[:2])
    width, height = (max(1, round(length * scale)) for length in (pixels.shape[1], pixels.shape[0]))
    image = Image.fromarray(np.rint(255 * pixels).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    if keep is None:
        return image
    y, x = np.arange(height) * rows // height, np.arange(width) * cols // width
    drawn = np.asarray(image).astype(float)
    return Image.fromarray(np.where(keep[y][:, x][..., None], drawn, dimmed(drawn)).round().astype(np.uint8))


def _outlined(pixels: np.ndarray, cells: np.ndarray, side: int) -> np.ndarray:
    """The image with lines between tokens of different cells, `side` pixels wide or high."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    resized = Image.fromarray(np.rint(255 * pixels).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    drawn = np.asarray(resized) / 255
    rows, cols = cells.shape
    shown = cells[np.arange(height) * rows // height][:, np.arange(width) * cols // width]
    edge = np.zeros(shown.shape, bool)
    edge[1:] |= shown[1:] != shown[:-1]
    edge[:, 1:] |= shown[:, 1:] != shown[:, :-1]
    return np.where(edge[..., None], EDGE, drawn)


def _count(sample: Retained) -> str:
    return f"{sample.kept} of {sample.total}" + (" (merged)" if sample.cells is not None else "")


def _total(samples: Sequence[Retained]) -> str:
    counts = sorted({sample.total for sample in samples})
    return f"{counts[0]} tokens" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} tokens"


def _shortened(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Text that fits a width, with an ellipsis where it is cut."""
    words = " ".join(words.split())
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(f"{words}…") > width:
        words = words[:-1]
    return f"{words.rstrip()}…"
