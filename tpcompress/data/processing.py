"""Call a processor on the conversations of one row, so that the images of the row are processed once."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpcompress.data.blank import BLANK, GREY, blank_image
from tpcompress.data.rows import BadRow, open_image
from tpcompress.data.video import VideoSampling, open_video
from tpcompress.errors import first_line

KINDS = ("image", "video")


@dataclass
class Media:
    """Opened media of a row.

    Attributes:
        images: PIL images.
        videos: frames of each video: uint8 (T, H, W, 3).
        metadata: `VideoMetadata` of each video.
    """

    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    metadata: list[Any] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Number of media by kind."""
        return {"image": len(self.images), "video": len(self.videos)}


@dataclass
class Processed:
    """What a processor returns for one conversation.

    Attributes:
        values: tensors by name: (1, S) per token, others by image, video, tile, patch or row.
        text: text that was tokenized, with placeholders.
        offsets: (start, end) of every token in the text.
    """

    values: dict[str, Tensor]
    text: str
    offsets: list[tuple[int, int]]


class RowProcessor:
    """A processor that processes the media of a row once and tells where its tokens are in the text.

    It works on a shallow copy of the processor whose tokenizer and image and video processors are wrapped, so that it
    needs no knowledge of how a processor expands placeholders.

    Args:
        processor: any processor with a fast tokenizer.
        nested: whether it takes images nested by row.
    """

    def __init__(self, processor: Any, nested: bool = True) -> None:
        self.processor = copy.copy(processor)
        self.nested = nested
        self._tokenizer = self.processor.tokenizer = _Recorder(processor.tokenizer)
        if hasattr(processor, "_merge_kwargs"):
            self.processor._merge_kwargs = _Merged(processor._merge_kwargs)
        self._once: list[_Once] = []
        for kind in KINDS:
            name = f"{kind}_processor"
            if getattr(processor, name, None) is not None:
                self._once.append(_Once(getattr(processor, name)))
                setattr(self.processor, name, self._once[-1])

    def __call__(self, text: str, media: Media, **more: Any) -> Processed:
        """Process one conversation.

        Raises:
            BadRow: the processor refuses it.
        """
        try:
            values = call(self.processor, [text], [media], self.nested, **more)
        except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            # Processors raise these for images too narrow for their patches, wrong counts and the like.
            raise BadRow(f"the processor refuses it: {first_line(error)[:200]}") from error
        return Processed(values, self._tokenizer.text, self._tokenizer.offsets)

    def forget(self) -> None:
        """Release the media of a row."""
        for once in self._once:
            once.clear()


def call(
    processor: Any, texts: list[str], media: Sequence[Media], nested: bool = True, **more: Any
) -> dict[str, Tensor]:
    """Call a processor as its `apply_chat_template` does: media nested by row, special tokens as in the text.

    Args:
        processor: the processor.
        texts: rendered conversations.
        media: media of each conversation.
        nested: pass images nested by row, as for most processors; one flat list otherwise.
        more: further arguments, such as `padding`.

    Returns:
        tensors by name.
    """
    bos = processor.tokenizer.bos_token
    if bos is not None and texts[0].startswith(bos):
        more["add_special_tokens"] = False
    if any(one.images for one in media):
        images = [one.images for one in media]
        more["images"] = images if nested else [image for one in images for image in one]
    if any(one.videos for one in media):
        more["videos"] = [one.videos for one in media]
        more["video_metadata"] = [metadata for one in media for metadata in one.metadata]
        more["do_sample_frames"] = False
    out = processor(text=texts, return_tensors="pt", **more)
    return {name: torch.as_tensor(value) for name, value in out.items()}


def open_media(row: Mapping[str, Any], video: VideoSampling | None = None) -> Media:
    """Open the images and videos of a row.

    Args:
        row: a row.
        video: how videos are sampled; None for the defaults of `VideoSampling`.

    Raises:
        BadRow: one of them is missing or corrupt.
    """
    images = [open_image(image) for image in row.get("images") or []]
    opened = [open_video(one, video or VideoSampling()) for one in row.get("videos") or []]
    media = Media(images, [frames for frames, _ in opened], [metadata for _, metadata in opened])
    if row.get(BLANK):
        media.images = [blank_image(image.size) for image in images]
        media.videos = [np.full_like(frames, GREY) for frames in media.videos]
    return media


class _Wrapped:
    """Everything of an object but what a subclass defines."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._inner, name)


class _Merged:
    """The merging of keyword arguments of a processor, which validates them, done once for the same arguments.

    Without it a sixth of the time of small images goes there, as it is done per row instead of per batch.
    """

    def __init__(self, merge: Callable[..., dict[str, Any]]) -> None:
        self._merge = merge
        self._seen: dict[Any, dict[str, Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        key = (
            args,
            *((name, id(value) if name == "tokenizer_init_kwargs" else value) for name, value in kwargs.items()),
        )
        try:
            if key not in self._seen:
                self._seen[key] = self._merge(*args, **kwargs)
        except TypeError:  # an argument that cannot be compared, such as the metadata of videos
            return self._merge(*args, **kwargs)
        merged = self._seen[key]
        return {name: dict(value) if isinstance(value, dict) else value for name, value in merged.items()}


class _Recorder(_Wrapped):
    """A tokenizer that remembers the last text and the offsets of its tokens.

    It makes tensors of its lists itself: transformers flattens them in Python first, which takes longer than the
    tokenization where an image has a thousand placeholders.
    """

    text = ""
    offsets: list[tuple[int, int]] = []

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        # No warning about the length: the collator truncates.
        as_torch = kwargs.get("return_tensors") == "pt" and (isinstance(text, str) or len(text) == 1)
        if as_torch:
            kwargs = {name: value for name, value in kwargs.items() if name != "return_tensors"}
        out = self._inner(text, *args, **{"verbose": False, **kwargs})
        if as_torch:
            for name, value in out.items():
                out[name] = torch.tensor([value] if isinstance(text, str) else value)
        self.text = text if isinstance(text, str) else text[0]
        self.offsets = out.encodings[0].offsets
        return out


class _Once(_Wrapped):
    """An image or video processor that returns its last result again for the same objects."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.clear()

    def clear(self) -> None:
        self._seen: list[Any] = []
        self._out: Any = None

    def __call__(self, media: Any = None, *args: Any, **kwargs: Any) -> Any:
        if media is None:
            media = kwargs.pop("images", kwargs.pop("videos", None))
        flat = _flat(media)
        if self._out is None or [id(one) for one in flat] != [id(one) for one in self._seen]:
            self._out, self._seen = self._inner(media, *args, **kwargs), flat
        return copy.copy(self._out)  # processors pop keys that only they use


def _flat(media: Any) -> list[Any]:
    return [one for part in media for one in _flat(part)] if isinstance(media, list | tuple) else [media]
