"""The row format that all data sets share, with its checks: roles, image markers, broken images.

A row is a dict `{"images": [PIL.Image or path, ...], "conversations": [[{"role", "content"}, ...], ...],
"families": [str, ...]}`. The conversations are independent and share the images; `families[i]` is the question family
of conversation `i`. The literal `<image>` in the content of a user turn marks the position of an image; without
markers, all images are placed at the start of the first user turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import datasets
from PIL import Image, ImageOps
from torch.utils.data import Dataset

IMAGE_MARKER = "<image>"
TURN_COLUMNS = ("messages", "conversations")  # column names for turns in chat data, in order of preference
IMAGE_COLUMNS = ("images", "image")
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's role names; others are kept
OnBadRow = Literal["skip", "raise"]
Sample = TypeVar("Sample")


class BadRow(ValueError):
    """A row that cannot be trained on: `str()` is `<reason>` or `<reason>: <detail>`, one line."""

    @property
    def reason(self) -> str:
        """The category of the problem, such as `missing image`."""
        return str(self).partition(": ")[0]


@dataclass
class BadRows:
    """Counts of the rows left out, by reason; `str()` is the one-line report.

    Attributes:
        total: rows in the data set; 0 if unknown (streams).
        counts: rows left out, by reason.
        examples: the first few row ids of each reason, with the detail if there is one.
        max_examples: row ids that are kept per reason.
    """

    total: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    max_examples: int = 3

    def add(self, row_id: str, bad: BadRow) -> None:
        """Add one bad row to the counts."""
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < self.max_examples:
            detail = str(bad).partition(": ")[2]
            shown.append(f"{row_id} ({detail})" if detail else row_id)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        if not self.counts:
            return f"all {self.total} rows usable"
        shown = {reason: ", ".join(examples) for reason, examples in self.examples.items()}
        reasons = [f"{reason} {count} (e.g. {shown[reason]})" for reason, count in self.counts.items()]
        of = f" of {self.total}" if self.total else ""
        return f"{len(self)}{of} rows left out: {'; '.join(reasons)}"


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


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise a one-line ValueError unless `on_bad_row` is `skip` or `raise`."""
    if on_bad_row not in ("skip", "raise"):
        raise ValueError(f"on_bad_row must be 'skip' or 'raise', got {on_bad_row!r}.")


def bad_row_error(row_id: str, bad: BadRow) -> ValueError:
    """The error that is raised for a bad row under `on_bad_row: raise`."""
    return ValueError(f"Row {row_id} is broken: {bad}. Repair or remove it, or set on_bad_row to 'skip'.")


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


def open_image(image: Any, decode: bool = True) -> Image.Image:
    """Open one image of a row, by default decoded to upright RGB.

    Args:
        image: PIL image, path, or the `{"bytes", "path"}` dict of an undecoded `datasets.Image`.
        decode: decode the pixels; if False, only the header is read.

    Raises:
        BadRow: the image is missing or corrupt; the reason is `missing image` or `corrupt image`, with the file name.
    """
    name, source = _image_source(image)
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        return ImageOps.exif_transpose(opened).convert("RGB") if decode else opened
    except FileNotFoundError:
        raise BadRow(f"missing image: {name}") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # PIL raises any of these for damaged files, some with a message of several lines.
        raise BadRow(f"corrupt image: {name} ({type(error).__name__})") from None


def _image_source(image: Any) -> tuple[str, Any]:
    """A name for error messages, and the argument for `Image.open`."""
    if isinstance(image, Image.Image):
        return getattr(image, "filename", "") or "image in memory", image
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image.get("path") or "image bytes in the data set", BytesIO(image["bytes"])
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str | Path) or not str(path):
        raise BadRow(f"missing image: neither path nor bytes ({type(image).__name__})")
    return str(path), path


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "image":
        return IMAGE_MARKER
    return str(part.get("text") or "") if isinstance(part, dict) else str(part)
