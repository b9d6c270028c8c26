"""Find the shards of a streamed data set and read their records one by one, with images undecoded.

    open_shards("data/part-*.jsonl")                              # LLaVA's records, one file per shard
    open_shards("https://host/data/{00000..00127}.tar")           # images and a JSON of the same name
    open_shards("data/*.parquet")                                 # columns images (or image) and messages
    open_shards("HuggingFaceH4/llava-instruct-mix-vsft")          # a name on the hub

Parquet files and hub data sets are read by `datasets.load_dataset(..., streaming=True)`. JSON and tar files are read
here through fsspec, because `datasets` requires one type per column, which LLaVA's records do not have.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec

from tpcompress.data.chat import load_table
from tpcompress.data.llava_json import json_values
from tpcompress.data.rows import IMAGE_COLUMNS, TURN_COLUMNS, BadRow
from tpcompress.errors import first_line

Record = dict[str, Any]
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
READ_ROWS = 16  # rows of a parquet file read at a time
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Shards:
    """The shards of a source.

    Attributes:
        source: file, folder, pattern or hub name as given.
        names: file names, or shard numbers of `hub`.
        hub: streamed data set on the hub; None for files.
    """

    source: str
    names: tuple[str, ...]
    hub: datasets.IterableDataset | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Iterator[Record | BadRow]:
        """Yield the records of a shard in order, with the column names of the source.

        A `BadRow` is yielded in place of a record that cannot be parsed.

        Raises:
            Exception: the shard cannot be read (any exception of the file system or format).
        """
        if self.hub is not None:
            return _rows(self.hub.shard(len(self), index))
        name = self.names[index]
        return READERS[_kind(name)](name)

    @property
    def folder(self) -> Path:
        """The folder that relative image paths are resolved against: that of local files, else the current one."""
        local = self.hub is None and "://" not in self.names[0]
        return Path(self.source if Path(self.source).is_dir() else Path(self.names[0]).parent) if local else Path()


def open_shards(source: str | Path, split: str = "train") -> Shards:
    """Find the shards of a source and check its first record.

    Args:
        source: file, folder, pattern with `*` or `{00000..00127}`, URL, or name on the hub. Supported suffixes: .json,
            .jsonl (both also with .gz), .parquet and .tar.
        split: split of a data set on the hub.

    Raises:
        FileNotFoundError: there are no such files, or one of a numbered series is missing.
        ValueError: the format is unknown, no shard has a record, or the records have no conversations.
    """
    shards = _find(str(source), split)
    first = _first_record(shards)
    if not any(name in first for name in TURN_COLUMNS):
        raise ValueError(f"{source} has the columns {', '.join(first)}; chat data needs 'messages' or 'conversations'.")
    return shards


def _find(source: str, split: str) -> Shards:
    if Path(source).is_dir():
        names = sorted(str(path) for path in Path(source).rglob("*") if _kind(path.name) and path.is_file())
        kinds = {_kind(name) for name in names}
        if len(kinds) != 1:
            have = f"files of the formats {', '.join(sorted(kinds))}" if kinds else "no .json, .jsonl, .parquet or .tar"
            raise ValueError(f"Folder {source} holds {have}; name the files with a pattern, such as {source}/*.jsonl.")
        return Shards(source, tuple(names))
    if _kind(source):
        return Shards(source, tuple(_files(source)))
    if Path(source).is_file() or "://" in source or "*" in source:
        raise ValueError(f"Cannot stream {source}: give files that end in .json, .jsonl, .parquet or .tar.")
    if Path(source).is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"No file or folder {source}; give files that exist, or a name on the hub.")
    hub = _undecoded(load_table(source, split, path=source, split=split, streaming=True))
    return Shards(source, tuple(map(str, range(hub.num_shards))), hub)


def _files(source: str) -> list[str]:
    """The files that a path, URL or pattern matches, in order."""
    names = [expanded for part in _expand(source) for expanded in (_glob(part) if "*" in part else [part])]
    if not names:
        raise FileNotFoundError(f"No files match {source}; give another pattern.")
    missing = [name for name in names if "://" not in name and not Path(name).is_file()]
    if missing:
        of = f"; it is one of the {len(names)} files of {source}" if len(names) > 1 else ""
        raise FileNotFoundError(f"No file or folder {missing[0]}{of}. Give files that exist.")
    return names


def _expand(source: str) -> list[str]:
    """Expand ranges such as `{08..11}`."""
    found = RANGE.search(source)
    if found is None:
        return [source]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _expand(source[: found.start()] + n + source[found.end() :])]


def _glob(pattern: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(pattern)
    found = sorted(system.glob(path))
    return [system.unstrip_protocol(name) for name in found] if "://" in pattern else found


def _kind(name: str) -> str:
    """The format by the suffix of a name; empty if unknown."""
    suffixes = PurePosixPath(name.partition("?")[0]).suffixes
    last = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    return {".tgz": ".tar"}.get(last, last if last in READERS else "")


def _first_record(shards: Shards) -> Record:
    """The first record that can be read."""
    problem = ""
    for index in range(len(shards)):
        try:
            found = next((record for record in shards.read(index) if not isinstance(record, BadRow)), None)
        except Exception as error:  # file systems, archives and Arrow raise unrelated types; reported below
            problem = f" The last shard: {first_line(error)}"
        else:
            if found is not None:
                return found
    raise ValueError(f"{shards.source} holds no rows in {len(shards)} shards; give at least one conversation.{problem}")


# ------------------------------------------------------------------ formats


def _read_json(name: str) -> Iterator[Record | BadRow]:
    with fsspec.open(name, "rb", compression="infer") as file:
        for value in json_values(TextIOWrapper(file, encoding="utf-8-sig"), name):
            yield value if isinstance(value, dict) else BadRow(f"broken record: a {type(value).__name__}")


def _read_jsonl(name: str) -> Iterator[Record | BadRow]:
    """Read line by line, so that a broken line affects no other record."""
    with fsspec.open(name, "rb", compression="infer") as file:
        for line in file:
            if line.strip():
                yield _parsed(line)


def _parsed(text: bytes) -> Record | BadRow:
    try:
        value = json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:  # of JSON or of UTF-8
        return BadRow(f"broken record: {first_line(error)}")
    return value if isinstance(value, dict) else BadRow(f"broken record: a {type(value).__name__}")


def _read_tar(name: str) -> Iterator[Record | BadRow]:
    """Files with the same name up to the first dot form a record: a JSON, and images sorted by name."""
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
    endings = sorted(ending for ending in members if ending.rpartition(".")[2] in IMAGE_SUFFIXES)
    images = [{"bytes": members[ending], "path": f"{key}.{ending}"} for ending in endings]
    text = members.get("json")
    if text is None:
        return BadRow(f"no conversation: {key} has {', '.join(members)}, but no json")
    if text.lstrip().startswith(b"["):
        text = b'{"messages": ' + text + b"}"
    record = _parsed(text)
    if isinstance(record, BadRow):
        return record
    record = {"id": key} | {name: value for name, value in record.items() if name not in IMAGE_COLUMNS}
    return record | {"images": images}


def _read_parquet(name: str) -> Iterator[Record | BadRow]:
    file = {"path": "parquet", "data_files": [name], "split": "train"}
    return _rows(_undecoded(load_table(name, "train", streaming=True, **file)))


def _rows(table: datasets.IterableDataset) -> Iterator[Record | BadRow]:
    for batch in table.iter(READ_ROWS):  # unlike iter(table), this does not split the data by DataLoader worker
        for number in range(len(next(iter(batch.values())))):
            yield {name: column[number] for name, column in batch.items()}


def _undecoded(table: datasets.IterableDataset) -> datasets.IterableDataset:
    return table.decode(False) if table.features else table


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".tar": _read_tar, ".parquet": _read_parquet}
