"""Turns of a conversation in any known layout as `{"role", "content"}`, with the images and videos inside them.

Content is text or a list of parts. Where a turn holds an image or a video, its content gets a marker, and its *slot*
says which one it is: a reference, the index of an entry of the row's column, or None for the next entry of that column.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from tpcompress.data.bad_rows import BadRow, shown
from tpcompress.data.images import IMAGE_SUFFIXES, SOURCE_KEYS, Reference, reference

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
IMAGE_COLUMNS = (
    "images", "image", "image_path", "image_paths", "img", "imgs", "image_file", "image_files", "image_url",
    "image_urls", "picture", "pictures", "file_name",
)  # fmt: skip
"""Names of image columns, in order of preference."""
VIDEO_COLUMNS = ("videos", "video", "video_path", "video_paths", "video_file", "video_url", "frames")
MEDIA_KEYS = frozenset((*IMAGE_COLUMNS, *VIDEO_COLUMNS))
STILL_SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES if suffix not in ("gif", "webp", "apng"))
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "assistant",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
VIDEO_PARTS = ("video", "video_url", "input_video")
AUDIO_PARTS = ("audio", "audio_url", "input_audio")

Message = dict[str, str]
VideoReference = Reference | list[Reference]
Slot = VideoReference | int | None


@dataclass
class Slots:
    """Slots of the markers of a conversation, in order."""

    images: list[Slot] = field(default_factory=list)
    videos: list[Slot] = field(default_factory=list)

    def add_text(self, text: str) -> str:
        """Note the markers in a text; returns the text."""
        self.images += [None] * text.count(IMAGE_MARKER)
        self.videos += [None] * text.count(VIDEO_MARKER)
        return text


def read_turns(turns: Any) -> tuple[list[Message], Slots]:
    """Messages and slots of one conversation.

    Args:
        turns: list of turns `{"role" or "from", "content" or "value" or "text"}` or `{"user", "assistant"}`.

    Raises:
        BadRow: a turn has no or an unknown role, or a part or value that is not read.
    """
    messages, slots = [], Slots()
    for turn in listed(turns):
        if not isinstance(turn, dict):
            raise BadRow(f"unknown turn: {shown(turn)} ({type(turn).__name__}); give role and content")
        if "user" in turn and "assistant" in turn:
            messages += [_message(role, turn[role], {}, slots) for role in ("user", "assistant")]
            continue
        role = _first(turn, ("role", "from"))
        if role is None:
            raise BadRow(f"turn without a role: it has {shown(', '.join(turn)) or 'no keys'}")
        messages.append(_message(role, _first(turn, ("content", "value", "text", "parts")), turn, slots))
    return messages, slots


def listed(value: Any) -> list[Any]:
    """A value as a list: of a dict of equally long lists, the list of dicts (as `datasets` stores sequences)."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, entries, strict=True)) for entries in zip(*columns, strict=True)]
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def references(value: Any, kind: str = "image") -> list[Reference]:
    """The references of a column entry; empty entries are left out."""
    return [found for entry in listed(value) if (found := reference(entry, kind)) is not None]


def video_references(value: Any) -> list[VideoReference]:
    """The videos of a column entry: files, or lists of frames. A flat list of image files is one video."""
    entries = [entry for entry in listed(value) if entry is not None]
    paths = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    if len(entries) > 1 and all(isinstance(path, str) and path.lower().endswith(STILL_SUFFIXES) for path in paths):
        entries = [entries]
    found = [references(entry) if isinstance(entry, list | tuple) else reference(entry, "video") for entry in entries]
    return [video for video in found if video]


def text_of(value: Any) -> str:
    """Text of a scalar: numbers and truth values as in JSON, nothing for None and nan.

    Raises:
        BadRow: another type.
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise BadRow(f"unknown content: {shown(value)} ({type(value).__name__}); give text or a list of parts")


def json_of(value: Any, name: str) -> str:
    """Tool calls or tool schemas as the text of a JSON list, without keys that are null; empty for none.

    Raises:
        BadRow: text that is not JSON.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise BadRow(f"broken {name}: {error}") from None
    entries = [_without_nulls(entry) for entry in listed(value)]
    try:
        return json.dumps(entries, ensure_ascii=False) if entries else ""
    except (TypeError, ValueError) as error:  # bytes, dates
        raise BadRow(f"broken {name}: {error}") from None


def _message(role: Any, value: Any, turn: dict, slots: Slots) -> Message:
    known = ROLES.get(str(role).strip().lower())
    if known is None:
        raise BadRow(f"unknown role: {shown(repr(role))}")
    calls: Any = turn.get("tool_calls")
    if str(role).strip().lower() == "function_call":
        calls, value = [{"type": "function", "function": _parsed_call(value)}], None
    own = Slots()
    content = _with_media_of_turn(_content(value, own), turn, own)
    slots.images += own.images
    slots.videos += own.videos
    tool_calls = json_of(calls, "tool_calls")
    return {"role": known, "content": content} | ({"tool_calls": tool_calls} if tool_calls else {})


def _content(value: Any, slots: Slots) -> str:
    """Text of a content, with a marker for every image and video part.

    Texts are joined without a separator, as chat templates do; a line break separates a marker from text.
    """
    if not isinstance(value, list | tuple | dict):
        return slots.add_text(text_of(value))
    content, after_marker = "", False
    for part in listed(value):
        piece, is_marker = _part(part, slots)
        if content and piece and is_marker != after_marker and not (content[-1].isspace() or piece[0].isspace()):
            content += "\n"
        content, after_marker = content + piece, is_marker if piece else after_marker
    return content


def _part(part: Any, slots: Slots) -> tuple[str, bool]:
    """Text or marker of a part, and whether it is a marker."""
    if not isinstance(part, dict):
        return slots.add_text(text_of(part)), False
    kind = part.get("type") or _kind_by_key(part)
    if kind in TEXT_PARTS:
        return slots.add_text(text_of(_first(part, ("text", "content")))), False
    if kind in IMAGE_PARTS:
        slots.images.append(_slot(part, "image"))
        return IMAGE_MARKER, True
    if kind in VIDEO_PARTS:
        slots.videos.append(_slot(part, "video"))
        return VIDEO_MARKER, True
    if kind in AUDIO_PARTS:
        raise BadRow(f"unread media: a part of type {kind!r}; audio is not read")
    raise BadRow(f"unknown part: {shown(kind or ', '.join(part))}; known are {', '.join(TEXT_PARTS[:1])}, image, video")


def _kind_by_key(part: dict) -> str | None:
    kinds = (*IMAGE_PARTS, *VIDEO_PARTS, *AUDIO_PARTS, *TEXT_PARTS)
    return next((kind for kind in kinds if part.get(kind) is not None), None)


def _slot(part: dict, kind: str) -> Slot:
    given = _first(part, ("frames", *SOURCE_KEYS))
    if given is None:
        if part.get("file_id") is not None:
            raise BadRow(f"remote {kind}: a file_id is not read; download it and give its path")
        index = part.get("index")
        return index if isinstance(index, int) and not isinstance(index, bool) else None
    if kind == "video" and isinstance(given, list | tuple):
        return references(given) or None
    return reference({key: part[key] for key in SOURCE_KEYS if part.get(key) is not None}, kind)


def _with_media_of_turn(content: str, turn: dict, slots: Slots) -> str:
    """The content with markers for the images and videos that a turn holds beside it (`images`, `image`, ...)."""
    if MEDIA_KEYS.isdisjoint(turn):
        return content
    readers = (
        (IMAGE_MARKER, slots.images, IMAGE_COLUMNS, references, "image"),
        (VIDEO_MARKER, slots.videos, VIDEO_COLUMNS, video_references, "video"),
    )
    for marker, own, names, read, kind in readers:
        found: list[Any] = read(_first(turn, names))
        if not found:
            continue
        if not own:
            own += found
            content = marker * len(found) + ("\n" if content else "") + content
        elif own == [None] * len(found):
            own[:] = found
        else:
            raise BadRow(f"{kind} markers: {len(own)} for {len(found)} {kind}s of a turn")
    return content


def _parsed_call(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow(f"broken tool_calls: {error}") from None


def _first(entries: dict, names: tuple[str, ...]) -> Any:
    return next((entries[name] for name in names if entries.get(name) is not None), None)


def _without_nulls(value: Any) -> Any:
    """Without the null keys that Arrow adds where dicts of a column differ."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
