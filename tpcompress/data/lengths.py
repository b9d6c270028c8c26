"""Estimate the token length of rows from characters and image counts, to batch rows of similar length.

    length = characters * tokens per character + (images + videos) * tokens per image or video

Both rates are measured on a few rows; the images and videos of all other rows are not opened.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from tpcompress.data.bad_rows import BadRow
from tpcompress.data.encode import ChatEncoder
from tpcompress.data.messages import IMAGE_COLUMNS, VIDEO_COLUMNS
from tpcompress.data.records import PAIR_COLUMNS, TURN_COLUMNS

SAMPLE = 32  # rows on which the rates are measured
TEXT_COLUMNS = (*TURN_COLUMNS, *dict.fromkeys(sum(PAIR_COLUMNS, ())), "input", "system")
MEDIA_COLUMNS = (*IMAGE_COLUMNS, *VIDEO_COLUMNS)
READ_ROWS = 1000  # rows read at a time


@dataclass(frozen=True)
class Rates:
    """Tokens per character of text, and per image or video."""

    per_character: float = 0.25
    per_image: float = 0.0

    def length(self, characters: Any, images: Any) -> Any:
        """Estimated token count of a row, or of an array of rows."""
        return characters * self.per_character + images * self.per_image


def measure_rates(rows: Iterable[dict[str, Any]], encoder: ChatEncoder) -> Rates:
    """Measure the rates on the first usable rows."""
    characters = tokens = images = vision = 0
    for row in islice(rows, SAMPLE):
        text = "\n".join(message["content"] for messages in row["conversations"] for message in messages)
        try:
            vision += encoder.vision_tokens(row)
        except BadRow:
            continue
        characters, images = characters + len(text.encode()), images + count_media(row)
        tokens += _count(encoder, text)
    default = Rates()
    return Rates(tokens / characters if characters else default.per_character, vision / images if images else 0.0)


def estimate_lengths(rows: datasets.Dataset, encoder: ChatEncoder) -> np.ndarray:
    """Estimate the token count of every row.

    Args:
        rows: data set as returned by `load_chat`.
        encoder: encoder that the rows will be encoded with.

    Returns:
        float (rows,): estimated token counts, the same on every rank.
    """
    step = max(1, len(rows) // SAMPLE)
    rates = measure_rates((_row(rows, index) for index in range(0, len(rows), step)), encoder)
    columns = rows.with_format("arrow").select_columns(
        [name for name in rows.column_names if name in (*TEXT_COLUMNS, *MEDIA_COLUMNS)]
    )
    found = [
        rates.length(_sum(table, TEXT_COLUMNS, _characters), _sum(table, MEDIA_COLUMNS, _entries))
        for table in columns.iter(READ_ROWS)
    ]
    return np.concatenate(found)


def count_characters(conversations: list[list[dict[str, str]]]) -> int:
    """Number of text bytes of one row, counted as in `estimate_lengths`."""
    return sum(len(turn["content"].encode()) + len(turn["role"]) for turns in conversations for turn in turns)


def count_media(row: dict[str, Any]) -> int:
    """Number of images and videos of one row."""
    return len(row["images"]) + len(row.get("videos") or ())


def _row(rows: datasets.Dataset, index: int) -> dict[str, Any]:
    try:
        return rows[index]
    except BadRow:
        return {"conversations": [], "images": []}


def _count(encoder: ChatEncoder, text: str) -> int:
    return len(encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _sum(table: pa.Table, names: tuple[str, ...], count: Any) -> np.ndarray:
    """Sum of `count` over those of the named columns that the table has."""
    columns = [table[name].combine_chunks() for name in names if name in table.column_names]
    return sum((count(column) for column in columns), np.zeros(len(table)))


def _characters(array: pa.Array) -> np.ndarray:
    """Number of text bytes of every entry, including nested fields."""
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(float)
    if pa.types.is_struct(kind):
        return sum((_characters(array.field(number)) for number in range(kind.num_fields)), np.zeros(len(array)))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _per_list(array, _characters(array.flatten()))
    return np.zeros(len(array))


def _entries(array: pa.Array) -> np.ndarray:
    """Number of images of every entry: the length of a list, else 1."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _per_list(array, np.ones(len(array.flatten())))
    return array.is_valid().to_numpy(zero_copy_only=False).astype(float)


def _per_list(array: pa.Array, values: np.ndarray) -> np.ndarray:
    """Sum `values`, which has one number per list element, over each list."""
    lengths = pa.compute.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    ends = lengths.cumsum()
    running = np.concatenate([[0.0], values.cumsum()])
    return running[ends] - running[ends - lengths]
