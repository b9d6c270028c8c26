"""Read chat data sets as rows: JSON, JSONL, CSV, tar, parquet and Arrow files, saved data sets, and the hub.

    load_chat("mix665k.json", image_folder="images")     # [{"image": ..., "conversations": [{"from", "value"}]}]
    load_chat("folder_of_save_to_disk")                  # columns images (or image) and messages
    load_chat("data.parquet")                            # a file, or a folder of them
    load_chat("HuggingFaceH4/llava-instruct-mix-vsft")   # a name on the hub

`records` lists the columns that are read. Memory use does not grow with the data: text formats are parsed record by
record into an Arrow file, other formats are memory-mapped, and rows are built on access. Images stay paths or undecoded
bytes. `load_chat` scans the data once for broken rows and reads the header of every image and video.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from tpcompress.data.arrow_rows import STORED, completed, from_stored, stored
from tpcompress.data.bad_rows import BadRow, BadRows, OnBadRow, bad_row_error, check_on_bad_row
from tpcompress.data.formats import read_file
from tpcompress.data.images import check_image
from tpcompress.data.records import COLUMNS, Record, Row, columns_error, has_conversation, read_record
from tpcompress.data.sources import Source, find_source, load_saved
from tpcompress.data.tables import first_reason, load_table, undecoded
from tpcompress.data.video import check_video
from tpcompress.paths import check_image_folder

SCAN_BATCH = 64  # rows whose image bytes are in memory at once during the scan for broken rows
GIVE_UP_AFTER = 100  # records without a conversation after which text files are rejected
LAYOUT = 4  # part of the cache key; increase it when the rows of the same records change
TABLES = ({".parquet"}, {".arrow"})
ROW_KEYS = ("id", "images", "videos", "conversations", "families", "references", "tools")


def load_chat(
    source: str | Path,
    image_folder: str | Path | None = None,
    split: str = "train",
    on_bad_row: OnBadRow = "skip",
    check_images: bool = True,
    cache_dir: str | Path | None = None,
    default_family: str = "chat",
    config_name: str | None = None,
) -> tuple[datasets.Dataset, BadRows]:
    """Read chat data as rows.

    A column `families` (one name per conversation of a row) or `family` (one name per row) groups the questions.

    Args:
        source: file, pattern, folder, or name of a data set on the hub, see `open_shards`.
        image_folder: folder that relative image paths are resolved against; by default the folder of `source`.
        split: split to read, if a folder or hub data set has several.
        on_bad_row: `skip` leaves broken rows out, `raise` stops at the first.
        check_images: read the header of every image and video during the scan; if False, missing and corrupt ones are
            only detected when their row is used.
        cache_dir: folder for Arrow files; by default the cache folder of `datasets`.
        default_family: family of conversations without one.
        config_name: config to read, if a folder or hub data set has several.

    Returns:
        data set of rows (see `rows`), and the report of the rows left out.

    Raises:
        FileNotFoundError: `source` or `image_folder` does not exist.
        ValueError: the format, split, config or columns are unknown, no row is usable, or a row is broken under
            `raise`.
        ImportError: the data has videos, and the package that decodes them is missing.
    """
    check_on_bad_row(on_bad_row)
    found = find_source(source, split, config_name)
    base = found.folder if image_folder is None else check_image_folder(image_folder)
    table, read = _open_table(found, None if cache_dir is None else str(cache_dir))
    if not len(table):
        raise ValueError(f"{source} holds no rows; give a data set with at least one conversation.")
    good, report = _scan(table, read, str(base), on_bad_row, check_images)
    if not good:
        raise ValueError(f"No usable row in {source}: {report}.")
    if len(good) < len(table):
        table = table.select(good)
    if read is read_record:
        table = table.select_columns([name for name in table.column_names if name in COLUMNS])
    return table.with_transform(partial(_rows_of, read=read, base=str(base), family=default_family)), report


def _open_table(source: Source, cache_dir: str | None) -> tuple[datasets.Dataset, Callable[[Record], Row]]:
    """An undecoded table, and the function that makes a row of the columns of a record."""
    if source.files and source.kinds not in TABLES:
        return _stored_table(source, cache_dir), from_stored
    if source.is_saved:
        table = load_saved(source)
    elif source.files:
        base, kind = source.split.partition("[")[0], next(iter(source.kinds))[1:]
        files = {"path": kind, "data_files": {base: list(source.files)}}
        table = load_table(source.given, **files, split=source.split, cache_dir=cache_dir)
    else:
        named = {} if source.config_name is None else {"name": source.config_name}
        table = load_table(source.given, path=source.given, split=source.split, cache_dir=cache_dir, **named)
    if not has_conversation(table.column_names):
        raise columns_error(source.given, table.column_names)
    return undecoded(table).with_format(None), read_record


def _stored_table(source: Source, cache_dir: str | None) -> datasets.Dataset:
    """Parse text and tar files into an Arrow table of rows.

    The readers of `datasets` infer one type per column and therefore fail on LLaVA's files, which mix numbers and
    strings in `id`, and strings and lists in `image`.
    """
    if "[" in source.split:
        raise ValueError(f"Only parquet and Arrow files can be sliced, got split {source.split!r}; name the split.")
    local = [Path(name) for name in source.files if "://" not in name]
    stats = [path.stat() for path in local]
    if local and not any(stat.st_size for stat in stats):
        raise ValueError(f"{source.given} is empty; give a list of records with 'conversations'.")
    # The stamps are part of the cache key, so that an edited file is read again.
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    names = tuple(str(Path(name).resolve()) if "://" not in name else name for name in source.files)
    arguments = {"given": source.given, "names": names, "stamps": stamps, "layout": LAYOUT}
    try:
        return datasets.Dataset.from_generator(
            _stored_records, features=STORED, gen_kwargs=arguments, cache_dir=cache_dir
        )
    except DatasetGenerationError as error:
        raise ValueError(first_reason(error)) from None


def _stored_records(given: str, names: tuple[str, ...], stamps: Any, layout: int) -> Iterator[dict]:
    """Yield the records of files as Arrow columns. Malformed records are kept; the scan of `load_chat` counts them."""
    known, number = False, -1
    others: Record = {}
    for number, (row_id, record) in enumerate(chain.from_iterable(map(_numbered, names))):
        if isinstance(record, dict) and not known:
            known, others = has_conversation(record), others or record
        if not known and others and number >= GIVE_UP_AFTER:
            break
        yield stored(record, row_id)
    if others and not known:
        raise columns_error(given, others)
    if number < 0:
        raise ValueError(f"{given} holds no rows; give a data set with at least one conversation.")


def _numbered(name: str) -> Iterator[tuple[str, Record | BadRow]]:
    """The records of a file, each with the id of a record that has none."""
    return ((f"{Path(name).name}:{number}", record) for number, record in enumerate(read_file(name)))


def _records(batch: dict[str, list]) -> list[Record]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _rows_of(batch: dict[str, list], read: Callable[[Record], Row], base: str, family: str) -> dict[str, list]:
    """Convert the columns of a batch to columns of rows; runs on access."""
    rows = [completed(read(record), base, family) for record in _records(batch)]
    return {key: [row[key] for row in rows] for key in ROW_KEYS}


def _scan(
    table: datasets.Dataset, read: Callable[[Record], Row], base: str, on_bad_row: OnBadRow, check_media: bool
) -> tuple[list[int], BadRows]:
    """Indices of the usable rows, and the report. Not cached, because image files can change independently."""
    report, good = BadRows(total=len(table), with_media=0), []
    check = partial(_checked, read=read, base=base, check_media=check_media)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(table), SCAN_BATCH):
            records = _records(table[start : start + SCAN_BATCH])
            for number, (record, found) in enumerate(zip(records, pool.map(check, records), strict=True), start):
                if isinstance(found, BadRow):
                    row_id = str(number) if record.get("id") is None else str(record["id"])
                    if on_bad_row == "raise":
                        raise bad_row_error(row_id, found)
                    report.add(row_id, found)
                else:
                    good.append(number)
                    report.with_media = (report.with_media or 0) + found
    return good, report


def _checked(record: Record, read: Callable[[Record], Row], base: str, check_media: bool) -> BadRow | bool:
    """Why a record is no usable row; else whether the row holds an image or a video."""
    try:
        row = completed(read(record), base)
        for image in row["images"] if check_media else []:
            check_image(image)
        for video in row["videos"] if check_media else []:
            check_video(video)
    except BadRow as bad:
        return bad
    return bool(row["images"] or row["videos"])
