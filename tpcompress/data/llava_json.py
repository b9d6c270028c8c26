"""Parse LLaVA's JSON and JSONL files into an Arrow table, record by record."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets.exceptions import DatasetGenerationError

from tpcompress.data.rows import IMAGE_COLUMNS, TURN_COLUMNS, chat_message

READ_CHARS = 1 << 20  # characters read at a time
GIVE_UP_AFTER = 100  # records without a conversation after which the file is rejected
LAYOUT = 2  # part of the cache key; increase it when the output of `_llava_records` changes


def read_llava_json(path: Path, cache_dir: str | None) -> datasets.Dataset:
    """Read a JSON or JSONL file as an Arrow table.

    The JSON reader of `datasets` infers one type per column and therefore fails on LLaVA's files, which mix numbers
    and strings in `id`, and strings and lists in `image`.

    Args:
        path: file with a list of records (JSON) or consecutive records (JSONL).
        cache_dir: folder for the Arrow file; by default the cache folder of `datasets`.

    Returns:
        table with the columns `id`, `images` (paths as written) and `messages`, and `families` if a record has
        `families` (a list of names) or `family` (a name).

    Raises:
        ValueError: the file is empty, is not JSON, or has no conversations.
    """
    turns = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    texts = datasets.List(datasets.Value("string"))
    features = {"id": datasets.Value("string"), "images": texts, "messages": turns, "families": texts}
    stamp = path.stat()  # part of the cache key, so that an edited file is read again
    arguments = {"path": str(path.resolve()), "stamp": (stamp.st_size, stamp.st_mtime_ns), "layout": LAYOUT}
    if not stamp.st_size:
        raise ValueError(f"{path} is empty; give a list of records with 'conversations'.")
    try:
        table = datasets.Dataset.from_generator(
            _llava_records, features=datasets.Features(features), gen_kwargs=arguments, cache_dir=cache_dir
        )
    except DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error).splitlines()[0]) from None
    has_families = any(len(chunk.values) for chunk in table.data.column("families").chunks)
    return table if has_families else table.remove_columns("families")


def _llava_records(path: str, stamp: tuple[int, int], layout: int) -> Iterator[dict]:
    """Yield the records of a file in one schema. Malformed records are kept; the scan in `load_chat` counts them."""
    known = False
    for number, record in enumerate(_values_of(path)):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {number} is a {type(record).__name__}; LLaVA data is a list of objects.")
        turns: list = next((record[name] for name in TURN_COLUMNS if isinstance(record.get(name), list)), [])
        images: Any = next((record[name] for name in IMAGE_COLUMNS if record.get(name)), [])
        known = known or any(name in record for name in TURN_COLUMNS)
        if not known and number >= GIVE_UP_AFTER:
            break
        yield {
            "id": str(record.get("id", number)),
            "images": [str(image) for image in (images if isinstance(images, list) else [images])],
            "messages": [chat_message(turn) for turn in turns],
            "families": [str(name) for name in _families_of(record)],
        }
    if not known:
        raise ValueError(f"{path}: no record has 'conversations' or 'messages'; give data in LLaVA's format.")


def _families_of(record: dict) -> list:
    """Families of a record: its list `families`, its single `family`, or none."""
    if isinstance(record.get("families"), list):
        return record["families"]
    return [record["family"]] if record.get("family") else []


def _values_of(path: str) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig") as file:
        yield from json_values(file, path)


def json_values(file: TextIO, path: str) -> Iterator[Any]:
    """Yield the elements of a JSON list, or consecutive values (JSONL), without reading the whole file at once.

    Args:
        file: open text file.
        path: file name for error messages.

    Raises:
        ValueError: the text is not JSON.
    """
    decoder = json.JSONDecoder()
    text, at, done, in_list = file.read(READ_CHARS), 0, False, False
    while True:
        while at < len(text) and (text[at].isspace() or text[at] == "," or (text[at] == "[" and not in_list)):
            in_list = in_list or text[at] == "["
            at += 1
        if at < len(text) and not (in_list and text[at] == "]"):
            try:
                value, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if done:
                    raise ValueError(f"{path} is not valid JSON near {text[at : at + 40]!r}: {error.msg}.") from None
            else:
                yield value
                continue
        elif at < len(text):
            return
        elif done:
            if in_list:
                raise ValueError(f"{path} is not valid JSON near its end: the list is not closed (truncated file?).")
            return
        more = file.read(READ_CHARS)
        text, at, done = text[at:] + more, 0, not more
