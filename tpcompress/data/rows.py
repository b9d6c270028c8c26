"""The row format that all data sets share, with its checks, and the data set that passes over bad rows.

A row is a dict:

    images          list of images: path, `{"bytes", "path"}` or PIL image; opened by `open_image`
    videos          list of videos: path, `{"bytes", "path"}` or list of images (frames); opened by `video.open_video`
    conversations   list of conversations, which are independent and share images and videos; a conversation is a list
                    of messages `{"role": system | user | assistant | tool, "content": str}`, with the JSON text
                    "tool_calls" where an assistant calls tools
    families        question family of each conversation
    tools           JSON text of a list of tool schemas, or None
    id              name of the row

The literals `<image>` and `<video>` in the content of a user or tool message mark the positions of images and videos;
without a marker of its kind, all of them are placed at the start of the first user turn.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import datasets
from torch.utils.data import Dataset

from tpcompress.data.bad_rows import BadRow, BadRows, OnBadRow, bad_row_error, check_on_bad_row
from tpcompress.data.images import open_image
from tpcompress.data.messages import IMAGE_MARKER, VIDEO_MARKER

__all__ = [
    "IMAGE_MARKER",
    "VIDEO_MARKER",
    "BadRow",
    "BadRows",
    "GoodRows",
    "OnBadRow",
    "bad_row_error",
    "check_conversation",
    "check_on_bad_row",
    "open_image",
]

Sample = TypeVar("Sample")


class GoodRows(Dataset, Generic[Sample]):
    """Encoded samples of a data set of rows, where a bad row is replaced by the next good one.

    Item `i` is `(sample, bad)`: the encoded sample of the first good row from `i` on, and `(row id, BadRow)` of each
    row skipped before it. Bad rows are returned with the sample because worker processes of a data loader cannot
    update counters of the main process.

    Args:
        rows: data set of rows.
        encode: function (row, index) -> sample that raises `BadRow` for a row it cannot encode.
        on_bad_row: `skip` takes the next good row, `raise` stops.

    Raises:
        ValueError: `rows` is empty; on access: the row is bad under `raise`, or no row is good.
    """

    def __init__(
        self, rows: datasets.Dataset, encode: Callable[[dict, int], Sample], on_bad_row: OnBadRow = "skip"
    ) -> None:
        if not len(rows):
            raise ValueError("The data set has no rows; give one with at least one row.")
        check_on_bad_row(on_bad_row)
        self.rows = rows
        self.encode = encode
        self.on_bad_row = on_bad_row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Sample, list[tuple[str, BadRow]]]:
        skipped: list[tuple[str, BadRow]] = []
        for step in range(len(self.rows)):
            candidate = (index + step) % len(self.rows)
            row_id = str(candidate)
            try:
                row = self.rows[candidate]
                row_id = row.get("id") or row_id
                return self.encode(row, candidate), skipped
            except BadRow as bad:
                if self.on_bad_row == "raise":
                    raise bad_row_error(row_id, bad) from None
                skipped.append((row_id, bad))
        raise ValueError(f"None of the {len(self.rows)} rows is usable; the last one: {skipped[-1][1]}.")


def check_conversation(messages: Sequence[dict[str, str]], num_images: int, num_videos: int = 0) -> None:
    """Check the roles, contents and markers of one conversation.

    A valid conversation has an optional system turn, then user and assistant turns in alternation, and ends with an
    assistant turn. Between two assistant turns there can be tool turns instead of a user turn.

    Args:
        messages: turns of the conversation.
        num_images: number of images in the row.
        num_videos: number of videos in the row.

    Raises:
        BadRow: the conversation is not valid; the reason is `unknown role`, `no assistant turn`, `role order`,
            `empty content`, `image marker in an answer` or `image markers` (or `video ...`).
    """
    roles = [message["role"] for message in messages]
    unknown = next((role for role in roles if role not in ("system", "user", "assistant", "tool")), None)
    if unknown is not None:
        raise BadRow(f"unknown role: {unknown!r}")
    if "assistant" not in roles:
        raise BadRow("no assistant turn")
    turns = roles[1:] if roles[0] == "system" else roles
    follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    in_order = all(role in follows.get(before, ()) for before, role in pairwise(turns))
    if turns[0] != "user" or turns[-1] != "assistant" or not in_order:
        raise BadRow(f"role order: {' '.join(roles[:6])}{' ...' if len(roles) > 6 else ''}")
    if any(not (message["content"].strip() or message.get("tool_calls")) and message["role"] != "tool"
           for message in messages):  # fmt: skip
        raise BadRow("empty content")
    for kind, marker, number in (("image", IMAGE_MARKER, num_images), ("video", VIDEO_MARKER, num_videos)):
        if any(marker in message["content"] for message in messages if message["role"] not in ("user", "tool")):
            raise BadRow(f"{kind} marker in an answer")
        num_markers = sum(message["content"].count(marker) for message in messages)
        if num_markers not in ({0, number} if number else {0}):
            raise BadRow(f"{kind} markers: {num_markers} for {number} {kind}s")
