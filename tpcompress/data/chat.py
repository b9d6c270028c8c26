"""Read chat data sets as rows: LLaVA JSON and JSONL, parquet, saved data sets, and data sets on the Hugging Face hub.

    load_chat("mix665k.json", image_folder="images")     # [{"image": ..., "conversations": [{"from", "value"}]}]
    load_chat("folder_of_save_to_disk")                  # columns images (or image) and messages
    load_chat("data.parquet")                            # a file, or a folder of them
    load_chat("HuggingFaceH4/llava-instruct-mix-vsft")   # a name on the hub

Memory use does not grow with the data: JSON is parsed record by record into an Arrow file, other formats are
memory-mapped, and rows are built on access. Images stay paths or undecoded bytes. `load_chat` scans the data once for
broken rows and reads the header of every image file.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from tpcompress.data.llava_json import read_llava_json
from tpcompress.data.rows import (
    IMAGE_COLUMNS,
    TURN_COLUMNS,
    BadRow,
    BadRows,
    OnBadRow,
    bad_row_error,
    chat_message,
    check_conversation,
    check_on_bad_row,
    open_image,
)

SCAN_BATCH = 64  # rows whose image bytes are in memory at once during the scan for broken rows


def load_chat(
    source: str | Path,
    image_folder: str | Path | None = None,
    split: str = "train",
    on_bad_row: OnBadRow = "skip",
    check_images: bool = True,
    cache_dir: str | Path | None = None,
    default_family: str = "chat",
) -> tuple[datasets.Dataset, BadRows]:
    """Read chat data as rows.

    A column `families` (one name per conversation of a row) or `family` (one name per row) groups the questions.

    Args:
        source: JSON or JSONL file, parquet file or folder of them, folder written by `save_to_disk`, or the name of
            a data set on the hub.
        image_folder: folder that relative image paths are resolved against; by default the folder of `source`.
        split: split to read if the data set has several; ignored for JSON files.
        on_bad_row: `skip` leaves broken rows out, `raise` stops at the first.
        check_images: read the header of every image during the scan; if False, missing and corrupt images are only
            detected when their row is used.
        cache_dir: folder for Arrow files; by default the cache folder of `datasets`.
        default_family: family of conversations without one.

    Returns:
        data set whose items are rows with an additional `id`, and the report of the rows left out.

    Raises:
        FileNotFoundError: `source` or `image_folder` does not exist.
        ValueError: the format, split or columns are unknown, no row is usable, or a row is broken under `raise`.
    """
    check_on_bad_row(on_bad_row)
    if image_folder is not None and not Path(image_folder).is_dir():
        raise FileNotFoundError(f"No image folder {image_folder}; give the folder that image paths are relative to.")
    table = _open_table(source, split, cache_dir)
    if not len(table):
        raise ValueError(f"{source} holds no rows; give a data set with at least one conversation.")
    base = Path(image_folder) if image_folder is not None else _folder_of(source)
    table, to_rows = _prepare(table, source, base, default_family)
    good, report = _scan(table, to_rows, on_bad_row, check_images)
    if not good:
        raise ValueError(f"No usable row in {source}: {report}.")
    if len(good) < len(table):
        table = table.select(good)
    return table.with_transform(to_rows), report


def _open_table(source: str | Path, split: str, cache_dir: str | Path | None) -> datasets.Dataset:
    """Open `source` as an undecoded table, whatever its format."""
    path, cache = Path(source), None if cache_dir is None else str(cache_dir)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        return read_llava_json(path, cache)
    if path.is_file() and path.suffix == ".parquet":
        return load_table(source, split, path="parquet", data_files=str(path), split="train", cache_dir=cache)
    if path.is_file():
        raise ValueError(f"Cannot read {path}: supported are .json, .jsonl and .parquet files; convert it to one.")
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        saved = datasets.load_from_disk(str(path))
        return _pick_split(saved, split, source) if isinstance(saved, datasets.DatasetDict) else saved
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise ValueError(f"Folder {path} holds neither parquet files nor a saved data set; name the JSON file itself.")
    if path.is_dir():
        return load_table(source, split, path=str(path), split=split, cache_dir=cache)
    if path.suffix in (".json", ".jsonl", ".parquet") or path.is_absolute() or str(source).startswith((".", "~")):
        raise FileNotFoundError(f"No file or folder {source}; give a JSON, JSONL or parquet file, or a folder.")
    return load_table(source, split, path=str(source), split=split, cache_dir=cache)


def load_table(source: str | Path, wanted: str, **arguments: Any) -> Any:
    """Call `datasets.load_dataset`, with failures reduced to one line."""
    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # the hub client, Arrow and the file system raise unrelated types
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        message = f"Cannot load split {wanted!r} of {source} with datasets.load_dataset: {lines[0]}"
        hint = "give a file or folder that exists, a hub name that can be reached, or another split."
        kind = FileNotFoundError if isinstance(error, FileNotFoundError | ConnectionError) else ValueError
        raise kind(f"{message.rstrip('.')}; {hint}") from error


def _pick_split(saved: datasets.DatasetDict, split: str, source: str | Path) -> datasets.Dataset:
    if split not in saved:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(saved)}.")
    return saved[split]


def _folder_of(source: str | Path) -> Path:
    """The folder that relative image paths are resolved against if none is given."""
    path = Path(source)
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def _prepare(table: datasets.Dataset, source: str | Path, base: Path, family: str) -> tuple[datasets.Dataset, Any]:
    """Select the columns that rows need, with images undecoded, and build the transform from columns to rows."""
    names = table.column_names
    turns = next((name for name in TURN_COLUMNS if name in names), None)
    if turns is None:
        raise ValueError(f"{source} has the columns {', '.join(names)}; chat data needs 'messages' or 'conversations'.")
    images = next((name for name in IMAGE_COLUMNS if name in names), None)
    wanted = [turns, images, *(name for name in ("id", "families", "family") if name in names)]
    table = table.select_columns([name for name in wanted if name is not None])
    if images is not None:
        feature, undecoded = table.features[images], datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(images, undecoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(images, datasets.List(undecoded))
    return table.with_format(None), partial(_rows_of_batch, turns=turns, images=images, base=str(base), family=family)


def _rows_of_batch(
    batch: dict[str, list], turns: str, images: str | None, base: str, family: str = "chat"
) -> dict[str, list]:
    """Convert the columns of a batch to columns of rows; runs on access."""
    conversations = [parse_conversations(value) for value in batch[turns]]
    num_rows = len(conversations)
    listed, named = (batch.get(name) or [None] * num_rows for name in ("families", "family"))
    families = [
        known or [str(name or family)] * len(row) for known, name, row in zip(listed, named, conversations, strict=True)
    ]
    return {
        "id": [str(row_id) for row_id in batch["id"]] if "id" in batch else [""] * num_rows,
        "images": [parse_images(value, base) for value in batch[images]] if images else [[] for _ in range(num_rows)],
        "conversations": conversations,
        "families": families,
    }


def parse_conversations(turns: Any) -> list[list[dict[str, str]]]:
    """The conversations of a record: one, or several if the data set already has the format of rows."""
    turns = turns or []
    several = turns and isinstance(turns[0], list)
    return [[chat_message(turn) for turn in conversation] for conversation in (turns if several else [turns])]


def parse_images(value: Any, base: str) -> list[Any]:
    """The images of a row, each as a path joined to `base` or as a PIL image that is not decoded yet."""
    entries = [] if value is None else value if isinstance(value, list) else [value]
    return [_image(entry, base) for entry in entries]


def _image(entry: Any, base: str) -> Any:
    if isinstance(entry, Image.Image) or (isinstance(entry, dict) and entry.get("bytes") is not None):
        return open_image(entry, decode=False)
    path = entry.get("path") if isinstance(entry, dict) else entry
    return str(Path(base, path)) if path else ""


def _scan(table: datasets.Dataset, to_rows: Any, on_bad_row: OnBadRow, check_images: bool) -> tuple[list[int], BadRows]:
    """Indices of the usable rows, and the report. Not cached, because image files can change independently."""
    report, good = BadRows(total=len(table)), []
    images = to_rows.keywords["images"]
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(table), SCAN_BATCH):
            batch = table[start : start + SCAN_BATCH]
            rows = _rows_of_batch({**batch, images: []} if images else batch, to_rows.keywords["turns"], None, "")
            entries = batch[images] if images else [None] * len(rows["conversations"])
            check = partial(find_problem, base=to_rows.keywords["base"], check_images=check_images)
            problems = pool.map(check, rows["conversations"], rows["families"], entries)
            for offset, problem in enumerate(problems):
                row_id = rows["id"][offset] or str(start + offset)
                if problem is None:
                    good.append(start + offset)
                elif on_bad_row == "raise":
                    raise bad_row_error(row_id, problem)
                else:
                    report.add(row_id, problem)
    return good, report


def find_problem(
    conversations: list[list[dict[str, str]]], families: list[str], entry: Any, base: str, check_images: bool
) -> BadRow | None:
    """Return why a row is broken, or None if it is usable."""
    entries = [] if entry is None else entry if isinstance(entry, list) else [entry]
    try:
        if not conversations or not conversations[0]:
            raise BadRow("no assistant turn")
        for messages in conversations:
            check_conversation(messages, len(entries))
        if len(families) != len(conversations):
            raise BadRow(f"families: {len(families)} for {len(conversations)} conversations")
        for image in entries if check_images else []:
            open_image(_image(image, base), decode=False).close()
    except BadRow as bad:
        return bad
    return None
