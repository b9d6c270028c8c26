"""Rows in Arrow columns, and rows as data sets give them."""

from typing import Any

import datasets

from tpcompress.data.bad_rows import BadRow
from tpcompress.data.images import located
from tpcompress.data.records import Record, Row, clean, read_record

_text = datasets.Value("string")
_texts = datasets.List(_text)
_file = {"path": _text, "bytes": datasets.Value("binary")}
_turn = {"role": _text, "content": _text, "tool_calls": _text}
STORED = datasets.Features(
    {
        "id": _text,
        "images": datasets.List(_file),
        "videos": datasets.List(_file | {"frames": datasets.List(_file)}),
        "conversations": datasets.List(datasets.List(_turn)),
        "families": _texts,
        "references": datasets.List(_texts),
        "tools": _text,
        "problem": _text,
    }
)
"""Arrow columns of rows whose media are references; `problem` says why a record is none."""


def completed(row: Row, base: str, family: str = "chat") -> Row:
    """A row as data sets give it: paths joined to a folder, and a family for every conversation.

    Args:
        row: output of `read_record`.
        base: folder that relative paths start from.
        family: name of conversations without a family.
    """
    videos = [
        [located(frame, base) for frame in video] if isinstance(video, list) else located(video, base)
        for video in row["videos"]
    ]
    families = row["families"] or [family] * len(row["conversations"])
    return row | {"images": [located(image, base) for image in row["images"]], "videos": videos, "families": families}


def stored(record: Record | BadRow, row_id: str) -> dict[str, Any]:
    """The Arrow columns `STORED` of a record."""
    empty = {name: None for name in STORED} | {"id": row_id}
    if isinstance(record, BadRow):
        return empty | {"problem": str(record)}
    try:
        row = read_record(record, row_id)
    except BadRow as bad:
        return empty | {"id": clean(str(record.get("id") or row_id)), "problem": str(bad)}
    videos = [{"frames": video} if isinstance(video, list) else video | {"frames": None} for video in row["videos"]]
    return row | {"videos": videos, "problem": None}


def from_stored(columns: dict[str, Any]) -> Row:
    """The inverse of `stored`.

    Raises:
        BadRow: the record was no usable row.
    """
    if columns["problem"] is not None:
        raise BadRow(columns["problem"])
    messages = [
        [{key: value for key, value in turn.items() if value is not None} for turn in conversation]
        for conversation in columns["conversations"]
    ]
    videos = [video["frames"] or {"path": video["path"], "bytes": video["bytes"]} for video in columns["videos"]]
    return columns | {"conversations": messages, "videos": videos}
