"""The row format that all data sets share, with its checks: roles, image markers, broken images.

A row is a dict `{"images": [PIL.Image or path, ...], "conversations": [[{"role", "content"}, ...], ...],
"families": [str, ...]}`. The conversations are independent and share the images; `families[i]` is the question family
of conversation `i`. The literal `<image>` in the content of a user turn marks the position of an image; without
markers, all images are placed at the start of the first user turn.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import datasets
from torch.utils.data import Dataset

from tpcompress.data.bad_rows import BadRow, BadRows, OnBadRow, bad_row_error, check_on_bad_row
from tpcompress.data.images import open_image

__all__ = [
    "IMAGE_COLUMNS",
    "IMAGE_MARKER",
    "TURN_COLUMNS",
    "BadRow",
    "BadRows",
    "GoodRows",
    "OnBadRow",
    "bad_row_error",
    "chat_message",
    "check_conversation",
    "check_on_bad_row",
    "open_image",
]

IMAGE_MARKER = "<image>"
TURN_COLUMNS = ("messages", "conversations")  # column names for turns in chat data, in order of preference
IMAGE_COLUMNS = ("images", "image")
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's role names; others are kept
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


def chat_message(turn: Any) -> dict[str, str]:
    """Convert a turn in LLaVA's or the Hugging Face format to `{"role", "content"}`; other content becomes empty."""
    turn = turn if isinstance(turn, dict) else {}
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "\n".join(_part(part) for part in content)
    return {"role": ROLES.get(str(role), str(role)), "content": content if isinstance(content, str) else ""}


def check_conversation(messages: Sequence[dict[str, str]], num_images: int) -> None:
    """Check the roles, contents and image markers of one conversation.

    A valid conversation has an optional system turn, then alternating user and assistant turns, and ends with an
    assistant turn.

    Args:
        messages: turns of the conversation.
        num_images: number of images in the row.

    Raises:
        BadRow: the conversation is not valid; the reason is `unknown role`, `no assistant turn`, `role order`,
            `empty content`, `image marker in an answer` or `image markers`.
    """
    roles = [message["role"] for message in messages]
    unknown = next((role for role in roles if role not in ("system", "user", "assistant")), None)
    if unknown is not None:
        raise BadRow(f"unknown role: {unknown!r}")
    if "assistant" not in roles:
        raise BadRow("no assistant turn")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow(f"role order: {' '.join(roles[:6])}{' ...' if len(roles) > 6 else ''}")
    if any(not message["content"].strip() for message in messages):
        raise BadRow("empty content")
    if any(IMAGE_MARKER in message["content"] for message in messages if message["role"] != "user"):
        raise BadRow("image marker in an answer")
    num_markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    if num_markers not in ({0, num_images} if num_images else {0}):
        raise BadRow(f"image markers: {num_markers} for {num_images} images")


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "image":
        return IMAGE_MARKER
    return str(part.get("text") or "") if isinstance(part, dict) else str(part)
