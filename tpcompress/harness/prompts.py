"""Prompts of a harness (turns of texts, images and videos) as rows of the collators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpcompress.data.rows import IMAGE_MARKER
from tpcompress.data.template import VIDEO_MARKER

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MARKERS = {"image": IMAGE_MARKER, "video": VIDEO_MARKER}


@dataclass(frozen=True)
class Part:
    """A piece of a turn.

    Attributes:
        kind: `text`, `image` or `video`.
        value: the text; a PIL image, path or `{"bytes"}`; a path or list of frames.
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: `system`, `user` or `assistant`.
        parts: its pieces in order.
    """

    role: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Prompt:
    """What a model answers.

    Attributes:
        name: name for error messages, such as `gqa 17`.
        turns: the conversation; the last turn is of the user.
        group: what counts are averaged over: the task.
    """

    name: str
    turns: Sequence[Turn] = field(default_factory=tuple)
    group: str = ""


def row_of(prompt: Prompt, answer: str | None = None) -> dict[str, Any]:
    """The row of a prompt; with an `answer`, a conversation that ends with it.

    Raises:
        ValueError: no user turn, an unknown piece, or a text that holds the marker of an image or video.
    """
    media: dict[str, list[Any]] = {"image": [], "video": []}
    messages = [{"role": turn.role, "content": _content(prompt, turn, media)} for turn in prompt.turns]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{prompt.name}: a prompt ends with a turn of the user.")
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {
        "images": media["image"], "videos": media["video"], "conversations": [messages],
        "families": [prompt.group or "prompt"],
    }  # fmt: skip


def interleaved(text: str, images: Sequence[Any], videos: Sequence[Any] = ()) -> list[Part]:
    """A text with its media: images at the `<image>` marks of the text if it has one for each, else all media first.

    Raises:
        ValueError: another number of marks.
    """
    pieces = text.split(IMAGE_MARKER)
    if len(pieces) == 1 or not images:
        first = [Part("image", image) for image in images] + [Part("video", video) for video in videos]
        return [*first, Part("text", text)]
    if len(pieces) != len(images) + 1:
        raise ValueError(f"the text has {len(pieces) - 1} {IMAGE_MARKER} for {len(images)} images; give one for each.")
    parts = [Part("video", video) for video in videos] + [Part("text", pieces[0])]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [Part("image", image), Part("text", piece)]
    return [part for part in parts if part.kind != "text" or part.value]


def sorted_media(visuals: Any) -> tuple[list[Any], list[Any]]:
    """Images and videos of a list of media, which may be nested; a path is a video unless it ends like an image.

    Raises:
        ValueError: audio.
    """
    images: list[Any] = []
    videos: list[Any] = []
    for visual in visuals or []:
        if isinstance(visual, list | tuple):
            more_images, more_videos = sorted_media(visual)
            images, videos = images + more_images, videos + more_videos
        elif isinstance(visual, Mapping) and "bytes" not in visual:
            raise ValueError("audio is not supported; tasks of text, images and videos can be run.")
        elif isinstance(visual, str) and not visual.lower().endswith(IMAGE_ENDINGS):
            videos.append(visual)
        elif visual is not None:
            images.append(visual)
    return images, videos


def _content(prompt: Prompt, turn: Turn, media: dict[str, list[Any]]) -> str:
    """The text of a turn with marks for its media, which are appended to `media`."""
    content, only_media = "", True
    for part in turn.parts:
        if part.kind in MARKERS:
            media[part.kind].append(part.value)
            # A line break after leading media, as rows without marks have it; parts of templates drop it.
            content += MARKERS[part.kind] + ("\n" if only_media else "")
        elif part.kind == "text":
            held = next((mark for mark in MARKERS.values() if mark in part.value), None)
            if held is not None and turn.role != "assistant":
                raise ValueError(
                    f"{prompt.name}: the text holds {held}, which would be read as the place of an image or video."
                )
            content, only_media = content + part.value, False
        else:
            raise ValueError(f"{prompt.name}: no {part.kind} support; prompts hold text, images and videos.")
    return content
