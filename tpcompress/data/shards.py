"""Find the shards of a streamed data set and read their records one by one, with images undecoded.

open_shards("data/part-*.jsonl")                              # LLaVA's records, one file per shard
open_shards("https://host/data/{00000..00127}.tar")           # images and a JSON of the same name
open_shards("data/*.parquet")                                 # columns images (or image) and messages
open_shards("HuggingFaceH4/llava-instruct-mix-vsft")          # a name on the hub
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets

from tpcompress.data.bad_rows import BadRow
from tpcompress.data.formats import read_file, record_rows
from tpcompress.data.records import Record, columns_error, has_conversation
from tpcompress.data.sources import Source, find_source, load_saved
from tpcompress.data.tables import load_table, undecoded
from tpcompress.errors import first_line

LOOK_AT = 100  # records of which one must have a conversation
SAVED_SHARDS = 64  # parts of a folder of `save_to_disk` that can be read independently


@dataclass(frozen=True)
class Shards:
    """The shards of a source.

    Attributes:
        source: file, folder, pattern or hub name.
        names: file names, or shard numbers of `table`.
        folder: folder that relative image paths are resolved against.
        table: streamed data set on the hub or of a saved folder; None for files.
    """

    source: str
    names: tuple[str, ...]
    folder: Path
    table: datasets.IterableDataset | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Iterator[Record | BadRow]:
        """Yield the records of a shard in order, with the column names of the source.

        A `BadRow` is yielded in place of a record that cannot be parsed.

        Raises:
            Exception: the shard cannot be read (any exception of the file system or format).
        """
        if self.table is not None:
            return record_rows(self.table.shard(len(self), index))
        return read_file(self.names[index])


def open_shards(source: str | Path, split: str = "train", config_name: str | None = None) -> Shards:
    """Find the shards of a source and check its first records.

    Args:
        source: file, folder, pattern with `*` or `{00000..00127}`, URL, or name on the hub. Supported suffixes: .json,
            .jsonl, .csv, .tsv (also with .gz), .tar, .parquet and .arrow.
        split: split of a folder or hub data set.
        config_name: config of a folder or hub data set with several.

    Raises:
        FileNotFoundError: there are no such files, or one of a numbered series is missing.
        ValueError: the format, split or config is unknown, no shard has a record, or the records have no conversations.
    """
    if "[" in split:
        raise ValueError(f"A stream reads whole splits, got {split!r}; give the name of a split.")
    shards = _shards_of(find_source(source, split, config_name))
    _check_columns(shards)
    return shards


def _shards_of(source: Source) -> Shards:
    if source.files:
        return Shards(source.given, source.files, source.folder)
    if source.is_saved:
        saved = undecoded(load_saved(source))
        table = saved.to_iterable_dataset(num_shards=max(1, min(SAVED_SHARDS, len(saved))))
    else:
        arguments = {"path": source.given, "split": source.split, "streaming": True}
        named = {} if source.config_name is None else {"name": source.config_name}
        table = undecoded(load_table(source.given, **arguments, **named))
    return Shards(source.given, tuple(map(str, range(table.num_shards))), source.folder, table)


def _check_columns(shards: Shards) -> None:
    """Refuse a source whose first readable records have no conversation."""
    problem, first = "", None
    for index in range(len(shards)):
        try:
            for record in islice(shards.read(index), LOOK_AT):
                if isinstance(record, BadRow):
                    problem = f" {record}."
                elif has_conversation(record):
                    return
                first = first or (record if isinstance(record, dict) else None)
        except Exception as error:  # file systems, archives and Arrow raise unrelated types; reported below
            problem = f" The last shard: {first_line(error)}"
        if first is not None:
            raise columns_error(shards.source, first)
    raise ValueError(f"{shards.source} holds no rows in {len(shards)} shards; give at least one conversation.{problem}")
