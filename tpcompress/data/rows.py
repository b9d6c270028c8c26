"""Rows: the one shape in which every data set reaches the collators.

A row is a dict ``{"images": [PIL.Image or path, ...], "conversations": [[{"role", "content"}, ...], ...],
"families": [str, ...]}``. The conversations are independent of one another and share the images;
``families[i]`` names the question family of conversation ``i``. The literal ``<image>`` in a user content says
where an image belongs; a conversation without any gets all images at the start of its first user turn.
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
TURN_COLUMNS = ("messages", "conversations")  # where chat data keeps its turns, in order of preference
IMAGE_COLUMNS = ("images", "image")
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names; others pass unchanged
OnBadRow = Literal["skip", "raise"]
Sample = TypeVar("Sample")


class BadRow(ValueError):
    """A row that cannot be trained on: ``str()`` is ``<reason>`` or ``<reason>: <detail>``, one line."""

    @property
    def reason(self) -> str:
        """The countable part, such as ``missing image``."""
        return str(self).partition(": ")[0]


@dataclass
class BadRows:
    """How many rows were left out of `total`, by reason; ``str()`` is the one-line report.

    `examples` keeps the first few row ids of each reason, with the detail where there is one. `total` is 0 where
    nobody knows it, in a stream.
    """

    total: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    max_examples: int = 3

    def add(self, row_id: str, bad: BadRow) -> None:
        """Count one bad row."""
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
    """Encoded samples of a data set of rows, where a row that turns out bad gives way to the next good one.

    Item ``i`` is ``(samples, bad)``: what `encode` made of the first good row from ``i`` on, and the
    ``(row id, BadRow)`` of those passed over. The bad rows travel with the sample because a loader's worker
    processes cannot count for the main one.

    Args:
        rows: Data set of rows.
        encode: From a row and its index to a sample; raises `BadRow`.
        on_bad_row: ``skip`` takes the next good row, ``raise`` stops.

    Raises:
        ValueError: If `rows` is empty; on access, if the row is bad under ``raise``, or if no row is good.
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
        passed_over: list[tuple[str, BadRow]] = []
        for step in range(len(self.rows)):
            candidate = (index + step) % len(self.rows)
            row_id = str(candidate)
            try:
                row = self.rows[candidate]
                row_id = row.get("id") or row_id
                return self.encode(row, candidate), passed_over
            except BadRow as bad:
                if self.on_bad_row == "raise":
                    raise bad_row_error(row_id, bad) from None
                passed_over.append((row_id, bad))
        raise ValueError(f"None of the {len(self.rows)} rows is usable; the last one: {passed_over[-1][1]}.")


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise a one-line ValueError unless `on_bad_row` is ``skip`` or ``raise``."""
    if on_bad_row not in ("skip", "raise"):
        raise ValueError(f"on_bad_row must be 'skip' or 'raise', got {on_bad_row!r}.")


def bad_row_error(row_id: str, bad: BadRow) -> ValueError:
    """The fatal, one-line form of a bad row."""
    return ValueError(f"Row {row_id} is broken: {bad}. Repair or remove it, or set on_bad_row to 'skip'.")


def chat_message(turn: Any) -> dict[str, str]:
    """``{"role", "content"}`` of a turn in LLaVA's or the Hugging Face form; what is not text becomes empty."""
    turn = turn if isinstance(turn, dict) else {}
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "\n".join(_part(part) for part in content)
    return {"role": ROLES.get(str(role), str(role)), "content": content if isinstance(content, str) else ""}


def check_conversation(messages: Sequence[dict[str, str]], num_images: int) -> None:
    """Check the roles, contents and image markers of one conversation.

    Legal is an optional system turn, then user and assistant turns in alternation, ending with an assistant turn.

    Args:
        messages: Turns of the conversation.
        num_images: Number of images of its row.

    Raises:
        BadRow: With the reasons ``unknown role``, ``no assistant turn``, ``role order``, ``empty content``,
            ``image marker in an answer`` or ``image markers``.
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
        image: PIL image, path, or the ``{"bytes", "path"}`` dict of an undecoded `datasets.Image`.
        decode: False reads no more than the header.

    Raises:
        BadRow: With the reasons ``missing image`` or ``corrupt image``, naming the file.
    """
    name, source = _image_source(image)
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        return ImageOps.exif_transpose(opened).convert("RGB") if decode else opened
    except FileNotFoundError:
        raise BadRow(f"missing image: {name}") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # PIL answers damage with any of these, some with text of several lines.
        raise BadRow(f"corrupt image: {name} ({type(error).__name__})") from None


def _image_source(image: Any) -> tuple[str, Any]:
    """Name for messages, and what `Image.open` takes."""
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
