"""One record of any known layout as a row, or the reason why it cannot be one. Whole and streamed data are read by it.

| column | meaning |
|---|---|
| `messages`, `conversations`, `conversation`, `texts` | turns, or a list of several conversations; also as JSON text |
| `prompt`/`completion`, `query`/`response`, `question`/`answer`, `instruction`(/`input`)/`output` | one turn each |
| `system`, `history` | system prompt, earlier turns as pairs |
| `images`, `image` and the other `IMAGE_COLUMNS`; `VIDEO_COLUMNS` | images and videos, see `images.reference` |
| `references`, `answers` | right answers for evaluation: texts, or a list of texts per conversation |
| `tools`, `families` or `family`, `id` | tool schemas, question families, name of the row |

Images and videos in columns that are not listed make a row bad, so that no run trains without them unnoticed.
"""

import json
from collections.abc import Iterable
from typing import Any

from PIL import Image

from tpcompress.data.bad_rows import BadRow, shown
from tpcompress.data.images import IMAGE_SUFFIXES, Reference
from tpcompress.data.messages import (
    IMAGE_COLUMNS,
    VIDEO_COLUMNS,
    Message,
    Slot,
    Slots,
    json_of,
    listed,
    read_turns,
    references,
    text_of,
    video_references,
)
from tpcompress.data.right_answers import REFERENCE_COLUMNS, most_common, right_answers
from tpcompress.data.rows import check_conversation
from tpcompress.data.video import VIDEO_SUFFIXES

Record = dict[str, Any]
Row = dict[str, Any]
TURN_COLUMNS = ("messages", "conversations", "conversation", "texts")
PAIR_COLUMNS = (
    ("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("question", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("question", "answers"),
)  # fmt: skip
OTHER_COLUMNS = (*REFERENCE_COLUMNS, "system", "system_prompt", "history", "input", "tools", "families", "family", "id")
COLUMNS = tuple(dict.fromkeys((*TURN_COLUMNS, *sum(PAIR_COLUMNS, ()), *OTHER_COLUMNS, *IMAGE_COLUMNS, *VIDEO_COLUMNS)))
"""All columns that rows are made of."""
MEDIA_COLUMNS = ("audio", "audios", "audio_path", "pixel_values", "image_base64", "image_bytes", "media")
"""Columns that hold media by their names, but are not read."""
DATA_URLS = ("data:image/", "data:video/", "data:audio/")
MEDIA_SUFFIXES = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, "wav", "mp3", "flac", "ogg"))


def has_conversation(columns: Iterable[str]) -> bool:
    """Whether there are columns for a conversation."""
    names = set(columns)
    return any(name in names for name in TURN_COLUMNS) or any(names >= set(pair) for pair in PAIR_COLUMNS)


def columns_error(source: Any, columns: Iterable[str]) -> ValueError:
    """The error for data without conversations."""
    have = shown(", ".join(columns)) or "none"
    return ValueError(
        f"{source} has the columns {have}; chat data needs 'messages' or 'conversations' (or prompt and completion, "
        "query and response, question and answer, instruction and output)."
    )


def read_record(record: Record, row_id: str = "") -> Row:
    """Read one record.

    Args:
        record: columns of any known layout, with images and videos undecoded.
        row_id: id of a record that has none.

    Returns:
        row with `id`, `conversations`, `families` (None if the record names none), `references` (right answers of each
        conversation, or None), `tools` (JSON text or None), and the references `images` and `videos`;
        `arrow_rows.completed` makes them those of a data set.

    Raises:
        BadRow: the record is no usable row.
    """
    conversations, all_slots = _conversations(record)
    column, names = _column(record, IMAGE_COLUMNS, references)
    videos_column, video_names = _column(record, VIDEO_COLUMNS, video_references)
    slots = _shared(all_slots)
    images = _filled(slots.images, column, "image")
    videos = _filled(slots.videos, videos_column, "video")
    _check_unread(record, names | video_names, bool(images or videos))
    row = {
        "id": text_of(record.get("id")) or row_id,
        "images": images,
        "videos": videos,
        "conversations": conversations,
        "families": _families(record, len(conversations)),
        "references": right_answers(record, len(conversations)),
        "tools": json_of(record.get("tools"), "tools") or None,
    }
    if not conversations or not conversations[0]:
        raise BadRow("no assistant turn")
    for messages in conversations:
        check_conversation(messages, len(images), len(videos))
    _check_unicode(row)
    return row


# ------------------------------------------------------------------ parts of a record


def _conversations(record: Record) -> tuple[list[list[Message]], list[Slots]]:
    """The conversations of a record, and the slots of each."""
    turns = _turns(record)
    several = [turns]
    if turns and all(isinstance(turn, list) and turn and isinstance(turn[0], dict) for turn in turns):
        several = turns
    pairs = [read_turns(conversation) for conversation in several]
    conversations = [messages for messages, _ in pairs]
    system = text_of(record.get("system")) or text_of(record.get("system_prompt"))
    for messages in conversations if system else []:
        if messages and messages[0]["role"] == "system" and messages[0]["content"] != system:
            raise BadRow("two system prompts: in the column and in the first turn")
        if messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    return conversations, [slots for _, slots in pairs]


def _turns(record: Record) -> list[Any]:
    """The turns of a record, of whatever layout."""
    for name in TURN_COLUMNS:
        if turns := listed(_parsed(record.get(name), name)):
            return turns
    for asked, answered in PAIR_COLUMNS:
        if record.get(asked) is not None and record.get(answered) is not None:
            question = _turns_of("user", record[asked])
            if asked == "instruction" and len(question) == 1 and text_of(record.get("input")):
                question[0]["content"] = f"{text_of(record[asked])}\n{text_of(record['input'])}"
            past = [
                {"role": role, "content": text}
                for pair in listed(_parsed(record.get("history"), "history"))
                for role, text in zip(("user", "assistant"), listed(pair), strict=False)
            ]
            answer = record[answered] if answered != "answers" else most_common(record[answered])
            return past + question + _turns_of("assistant", answer)
    if not has_conversation(record):
        raise BadRow(f"no conversation: the record has {shown(', '.join(map(str, record))) or 'no columns'}")
    return []


def _turns_of(role: str, value: Any) -> list[dict]:
    """Turns of one side of a pair: a text, or messages."""
    if isinstance(value, list | dict):
        return [turn if isinstance(turn, dict) else {"role": role, "content": turn} for turn in listed(value)]
    return [{"role": role, "content": value}]


def _parsed(value: Any, name: str) -> Any:
    """The list in a text of JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value) if value.strip() else None
    except ValueError:
        raise BadRow(f"broken {name}: the text is not JSON: {shown(value)}") from None
    if parsed is not None and not isinstance(parsed, list | dict):
        raise BadRow(f"broken {name}: the text is not a list of turns: {shown(value)}")
    return parsed


def _column(record: Record, names: tuple[str, ...], read: Any) -> tuple[list[Any], set[str]]:
    """Entries of the first non-empty column, and the names of the columns that they stand for."""
    for name in names:
        value = record.get(name)
        if value is None or (name == "frames" and not isinstance(value, list)):  # their number
            continue
        if found := read(value):
            other = read(record.get(names[1])) if name == names[0] else []
            if any(entry not in found for entry in other):
                raise BadRow(f"two columns of media: {names[0]} and {names[1]} differ; keep one of them")
            return found, {name, names[1]} if other else {name}
    return [], set()


def _shared(all_slots: list[Slots]) -> Slots:
    """The slots of a record: those of its conversation. Several conversations share the columns of their row."""
    if len(all_slots) == 1:
        return all_slots[0]
    if any(slot is not None for slots in all_slots for slot in (*slots.images, *slots.videos)):
        raise BadRow("media inside several conversations: put the images or videos of a row into a column")
    return Slots()


def _filled(slots: list[Slot], column: list[Any], kind: str) -> list[Any]:
    """The images or videos of a row, in the order of the markers."""
    if all(slot is None for slot in slots) or column == slots:
        return column
    filled: list[Any] = []
    unused = dict(enumerate(column))
    for slot in slots:
        index = next(iter(unused), len(column)) if slot is None else slot
        if not isinstance(index, int):
            filled.append(index)
        elif not 0 <= index < len(column):
            raise BadRow(f"{kind} markers: {len(slots)} for {len(column)} {kind}s in the column")
        else:
            filled.append(column[index])
            unused.pop(index, None)
    if unused:
        raise BadRow(f"{kind} markers: {len(unused)} of the {len(column)} {kind}s in the column have none")
    return filled


def _families(record: Record, number: int) -> list[str] | None:
    names = record.get("families") or ([record["family"]] * number if record.get("family") else None)
    if names is not None and len(listed(names)) != number:
        raise BadRow(f"families: {len(listed(names))} for {number} conversations")
    return None if names is None else [text_of(name) for name in listed(names)]


def _check_unread(record: Record, read: set[str], has_media: bool) -> None:
    """Refuse columns with media that nothing reads; names of files only where a row has no other media."""
    for name, value in record.items():
        if value is None or name in read or name in TURN_COLUMNS:
            continue
        known = name in COLUMNS
        what = _media_in(value) or ("media" if name in MEDIA_COLUMNS and value not in ("", [], {}) else "")
        if not what and not has_media and (not known or name == "file_name") and _is_media_file(value):
            what = f"the file name {shown(value)}"
        if what and not (known and has_media and isinstance(value, str)):
            raise BadRow(f"unread media: column {name!r} holds {what}; name it 'image' or 'video', or remove it")


def _media_in(value: Any) -> str:
    """What media a value holds, in words; empty for none. Long lists are judged by their first entries."""
    if isinstance(value, list | tuple):
        return next((found for entry in value[:8] if (found := _media_in(entry))), "")
    if isinstance(value, dict):
        return "a file" if value.get("bytes") is not None else ""
    if isinstance(value, Image.Image):
        return "an image"
    if isinstance(value, bytes | bytearray) and len(value):
        return "bytes"
    return (
        "a data URL" if isinstance(value, str) and value[:11] in ("data:image/", "data:video/", "data:audio/") else ""
    )


def _is_media_file(value: Any) -> bool:
    entries = value[:1] if isinstance(value, list) else [value]
    return any(
        isinstance(entry, str) and len(entry) < 1000 and "\n" not in entry and entry.lower().endswith(MEDIA_SUFFIXES)
        for entry in entries
    )


def _check_unicode(row: Row) -> None:
    """Refuse lone surrogates, which neither tokenizers nor Arrow take."""
    files: list[Reference] = [
        file for entry in (*row["images"], *row["videos"]) for file in (entry if isinstance(entry, list) else [entry])
    ]
    paths = [file["path"] for file in files if isinstance(file, dict) and file["path"]]
    turns = [text for messages in row["conversations"] for message in messages for text in message.values()]
    right = [text for texts in row["references"] or () for text in texts]
    for text in (row["id"], row["tools"] or "", *(row["families"] or ()), *paths, *turns, *right):
        if clean(text) != text:
            raise BadRow(f"lone surrogate: {shown(text)} is no valid Unicode")


def clean(text: str) -> str:
    """A text with question marks in place of lone surrogates."""
    return text.encode("utf-8", "replace").decode()
