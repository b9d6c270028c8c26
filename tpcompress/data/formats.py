"""Read the records of one file: JSON, JSONL, CSV, TSV, tar, parquet and Arrow; the first five also compressed (.gz).

JSON, CSV and tar files are read here through fsspec, record by record, because `datasets` requires one type per column,
which LLaVA's records do not have. A `BadRow` stands for a record that cannot be parsed.
"""

import csv
import json
import sys
import tarfile
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import datasets
import fsspec

from tpcompress.data.bad_rows import BadRow
from tpcompress.data.images import IMAGE_SUFFIXES
from tpcompress.data.messages import IMAGE_COLUMNS, VIDEO_COLUMNS
from tpcompress.data.records import Record
from tpcompress.data.tables import load_table, undecoded
from tpcompress.data.video import VIDEO_SUFFIXES
from tpcompress.errors import first_line

READ_CHARS = 1 << 20  # characters of a JSON file read at a time
READ_ROWS = 16  # rows of a parquet file read at a time
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
AUDIO_SUFFIXES = ("wav", "mp3", "flac", "ogg", "m4a")

csv.field_size_limit(sys.maxsize)  # messages as JSON text exceed the default


def kind_of(name: str) -> str:
    """The format by the suffix of a name, such as `.json`; empty if unknown."""
    suffixes = PurePosixPath(name.partition("?")[0]).suffixes
    last = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    return {".tgz": ".tar", ".ndjson": ".jsonl"}.get(last, last if last in READERS else "")


def read_file(name: str) -> Iterator[Record | BadRow]:
    """Yield the records of a file or address in order, with its column names.

    Raises:
        ValueError: the file is not of its format.
        Exception: the file cannot be read (any exception of the file system).
    """
    for record in READERS[kind_of(name)](name):
        if isinstance(record, dict) and isinstance(record.get("file_name"), str) and _is_image_folder(name):
            record["file_name"] = str(Path(name).parent / record["file_name"])
        yield record


def json_values(file: TextIO, path: str) -> Iterator[Any]:
    """Yield the elements of JSON lists, or consecutive values (JSONL), without reading the whole file at once.

    Args:
        file: open text file.
        path: file name for error messages.

    Raises:
        ValueError: the text is not JSON.
    """
    decoder = json.JSONDecoder()
    text, at, done, in_list = file.read(READ_CHARS), 0, False, False
    while True:
        while at < len(text) and (text[at].isspace() or text[at] == "," or text[at] == "[]"[in_list]):
            in_list = text[at] == "[" or (in_list and text[at] != "]")
            at += 1
        if at < len(text):
            try:
                value, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if done:
                    raise ValueError(f"{path} is not valid JSON near {text[at : at + 40]!r}: {error.msg}.") from None
            else:
                yield value
                continue
        elif done:
            if in_list:
                raise ValueError(f"{path} is not valid JSON near its end: the list is not closed (truncated file?).")
            return
        more = file.read(READ_CHARS)
        text, at, done = text[at:] + more, 0, not more


def record_rows(table: datasets.IterableDataset) -> Iterator[Record]:
    """Yield the rows of a streamed table; unlike `iter(table)`, not split by DataLoader worker."""
    for batch in table.iter(READ_ROWS):
        for number in range(len(next(iter(batch.values())))):
            yield {name: column[number] for name, column in batch.items()}


def _is_image_folder(name: str) -> bool:
    """Whether `file_name` is relative to the file, as in the imagefolder format of `datasets`."""
    return PurePosixPath(name).name.startswith("metadata.") and "://" not in name


def _read_json(name: str) -> Iterator[Record | BadRow]:
    with fsspec.open(name, "rb", compression="infer") as file:
        try:
            for value in json_values(TextIOWrapper(file, encoding="utf-8-sig"), name):
                yield value if isinstance(value, dict) else BadRow(f"broken record: a {type(value).__name__}")
        except UnicodeDecodeError as error:
            raise _encoding_error(name, f"{error.reason} {error.object[error.start]:#04x}") from None


def _read_jsonl(name: str) -> Iterator[Record | BadRow]:
    """Read line by line, so that a broken line affects no other record."""
    with fsspec.open(name, "rb", compression="infer") as file:
        first = True
        for line in file:
            if not line.strip():
                continue
            if first and line.startswith(UTF16_MARKS):
                raise _encoding_error(name, "it is UTF-16")
            if first and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):  # a list with the wrong suffix
                yield from _read_json(name)
                return
            first = False
            yield _parsed(line)


def _read_csv(name: str) -> Iterator[Record | BadRow]:
    with fsspec.open(name, "rb", compression="infer") as file:
        text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
        delimiter = "\t" if kind_of(name) == ".tsv" else ","
        try:
            for record in csv.DictReader(text, delimiter=delimiter):
                yield BadRow("broken record: more fields than columns") if None in record else record
        except UnicodeDecodeError as error:
            raise _encoding_error(name, f"{error.reason} {error.object[error.start]:#04x}") from None
        except csv.Error as error:
            raise ValueError(f"{name} is not valid CSV: {error}.") from None


def _encoding_error(name: str, problem: str) -> ValueError:
    return ValueError(f"{name} is not UTF-8 text ({problem}); save it as UTF-8.")


def _parsed(text: bytes) -> Record | BadRow:
    try:
        value = json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:  # of JSON or of UTF-8
        return BadRow(f"broken record: {first_line(error)}")
    return value if isinstance(value, dict) else BadRow(f"broken record: a {type(value).__name__}")


def _read_tar(name: str) -> Iterator[Record | BadRow]:
    """Files with the same name up to the first dot form a record: a JSON, and images and videos sorted by name."""
    with fsspec.open(name, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        key, members = "", dict[str, bytes]()
        for member in archive:
            if not member.isfile():
                continue
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")
            if members and str(path.parent / stem) != key:
                yield _record_of(key, members)
                members = {}
            key = str(path.parent / stem)
            content = archive.extractfile(member)
            members[ending.lower()] = content.read() if content is not None else b""
        if members:
            yield _record_of(key, members)


def _record_of(key: str, members: dict[str, bytes]) -> Record | BadRow:
    def files(suffixes: tuple[str, ...]) -> list[dict[str, Any]]:
        endings = sorted(ending for ending in members if ending.rpartition(".")[2] in suffixes)
        return [{"bytes": members[ending], "path": f"{key}.{ending}"} for ending in endings]

    text = members.get("json")
    if text is None:
        return BadRow(f"no conversation: {key} has {', '.join(members)}, but no json")
    if files(AUDIO_SUFFIXES):
        return BadRow(f"unread media: {key} has {', '.join(members)}; audio is not read")
    if text.lstrip().startswith(b"["):
        text = b'{"messages": ' + text + b"}"
    record = _parsed(text)
    if isinstance(record, BadRow):
        return record
    record = {"id": key} | record
    # The JSON may name the members, in its own way; they take the place of these names.
    for column, names, suffixes in (("images", IMAGE_COLUMNS, IMAGE_SUFFIXES), ("videos", VIDEO_COLUMNS, VIDEOS)):
        if found := files(suffixes):
            record = {name: value for name, value in record.items() if name not in names} | {column: found}
    return record


VIDEOS = tuple(suffix for suffix in VIDEO_SUFFIXES if suffix not in IMAGE_SUFFIXES)


def _read_table(name: str) -> Iterator[Record]:
    table = load_table(name, path=kind_of(name)[1:], data_files=[name], split="train", streaming=True)
    return record_rows(undecoded(table))


READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".tar": _read_tar,
    ".parquet": _read_table,
    ".arrow": _read_table,
}
"""Reader of every format, by suffix."""
