"""Splits a user's data into rows to train on, rows to choose a rule on, and rows for the table, as three files.

Rows with the same image are in the same part, so that nothing about an image of the table was seen before. The files
hold the rows as `ChatData` and the task `chat` read them; images stay where they are, and those inside the data are
written beside the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpcompress.data import BadRow, BadRows, load_chat
from tpcompress.data.split import groups_of
from tpcompress.files import atomic_path, write_atomic

PARTS = ("train", "choose", "table")
SHARE, FEW = 0.1, 8
MOST = {"table": 512, "choose": 128}
"""Rows of each held-out part: a share of all rows, but at least `FEW` (or a quarter of all), and at most these."""

FEWEST = 8
"""Rows with different images that a split needs."""


@dataclass(frozen=True)
class Split:
    """The files of a split.

    Attributes:
        folder: folder of the files.
        rows: number of rows in each part.
        left_out: rows of the data that cannot be used, in words; empty without any.
    """

    folder: Path
    rows: Mapping[str, int]
    left_out: str

    def file(self, part: str) -> str:
        """Path of a part: train, choose or table."""
        return str(self.folder / f"{part}.jsonl")

    def __str__(self) -> str:
        counts = self.rows
        text = f"{counts['train']} rows to train on, {counts['choose']} to choose on, {counts['table']} for the table"
        return f"{text}; {self.left_out}" if self.left_out else text


def split_data(
    source: str, folder: Path, image_folder: str | None = None, split: str = "train", seed: int = 0,
    no_video: str | None = None,
) -> Split:  # fmt: skip
    """Split the data, or return the split that the folder holds already.

    Args:
        source: data in any format that `load_chat` reads.
        folder: folder of the parts.
        image_folder: folder that relative image paths start from.
        split: split of `source` to read.
        seed: seed of the parts.
        no_video: why the model takes no videos; None if it does. Rows with one are left out.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, or has too few different images.
    """
    record = folder / "split.json"
    if record.is_file():
        known = json.loads(record.read_text())
        return Split(folder, known["rows"], known["left_out"])
    rows, report = load_chat(source, image_folder, split)
    if no_video is not None:
        rows = _without_videos(rows, report, no_video)
    groups = groups_of(rows)
    seen = [group for group in groups if any(rows[i]["images"] or rows[i].get("videos") for i in group)]
    if len(seen) < FEWEST:
        left_out = f" ({report})" if len(report) else ""
        raise ValueError(
            f"{source} has usable rows with {len(seen)} different images{left_out}; compress needs {FEWEST}. Give "
            "more rows, or --image_folder if the paths of images start elsewhere."
        )
    parts = _parts(groups, len(rows), seed)
    for part, indices in parts.items():
        records = (record for i in indices for record in _records(rows[i], i, folder / "images"))
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_atomic(folder / f"{part}.jsonl", "\n".join(lines) + "\n")
    counts = {part: len(indices) for part, indices in parts.items()}
    left_out = str(report) if len(report) else ""
    write_atomic(record, json.dumps({"source": source, "seed": seed, "rows": counts, "left_out": left_out}, indent=1))
    return Split(folder, counts, left_out)


def _without_videos(rows: Any, report: BadRows, why: str) -> Any:
    """The rows without videos; the others are added to the report."""
    kept = []
    for index in range(len(rows)):
        if rows[index].get("videos"):
            report.add(rows[index].get("id") or str(index), BadRow(f"no video support: {why}"))
        else:
            kept.append(index)
    return rows.select(kept) if len(kept) < len(rows) else rows


def _parts(groups: list[list[int]], num_rows: int, seed: int) -> dict[str, list[int]]:
    """Whole groups in random order: into the held-out part with fewer rows while there is room, else to train on."""
    share = max(1, min(max(round(SHARE * num_rows), FEW), num_rows // 4))
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    trained = []
    for index in np.random.default_rng(seed).permutation(len(groups)):
        group = groups[index]
        room = [part for part in MOST if len(parts[part]) + len(group) <= min(share, MOST[part])]
        if room:
            parts[min(room, key=lambda part: len(parts[part]))] += group
        else:
            trained.append(group)
    trained.sort(key=len, reverse=True)
    for part in MOST:  # where every image has more rows than a part may have
        parts[part] = parts[part] or trained.pop()
    parts["train"] = [row for group in trained for row in group]
    return {part: sorted(rows) for part, rows in parts.items()}


def _records(row: Mapping[str, Any], index: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row as lines of a file, one per conversation."""
    shared: dict[str, Any] = {"images": [_saved(image, folder) for image in row["images"]]}
    if row.get("videos"):
        shared["videos"] = [
            [_saved(frame, folder) for frame in video] if isinstance(video, list) else _saved(video, folder)
            for video in row["videos"]
        ]
    if row.get("tools"):
        shared["tools"] = row["tools"]
    name, number = row.get("id") or str(index), len(row["conversations"])
    for place, (messages, family) in enumerate(zip(row["conversations"], row["families"], strict=True)):
        identity = name if number == 1 else f"{name}-{place}"
        yield {"id": identity, **shared, "messages": messages, "family": family}


def _saved(image: Any, folder: Path) -> str:
    """Path of an image or a video; one that is inside the data is written first."""
    if isinstance(image, str | Path):
        return str(Path(image).resolve())
    if isinstance(image, Mapping) and image.get("bytes") is None:
        return str(Path(str(image["path"])).resolve())
    content = image["bytes"] if isinstance(image, Mapping) else image.tobytes()
    ending = "img" if isinstance(image, Mapping) else "png"
    path = (folder / f"{hashlib.sha256(content).hexdigest()[:24]}.{ending}").resolve()
    if not path.is_file():
        with atomic_path(path) as part:
            part.write_bytes(content) if isinstance(image, Mapping) else image.save(part)
    return str(path)
