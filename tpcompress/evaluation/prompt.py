"""Build the model inputs of one prompt with images and videos, as generation and training build them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tpcompress.data.prompts import prompt_inputs
from tpcompress.data.rows import IMAGE_MARKER, BadRow, open_image
from tpcompress.data.video import VideoSampling, open_video

VIDEO_MARKER = "<video>"


@dataclass(frozen=True, eq=False)
class Media:
    """Images and videos of one prompt, in the order of the prompt.

    Attributes:
        images: upright RGB images.
        videos: sampled frames of each video.
    """

    images: Sequence[Image.Image] = field(default_factory=list)
    videos: Sequence[Sequence[Image.Image]] = field(default_factory=list)


def read_image(path: str) -> Image.Image:
    """Read an image file as upright RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a readable image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No image file {path}; give an image such as a PNG or a JPEG.")
    try:
        return open_image(path)
    except BadRow:
        raise ValueError(f"{path} is not a readable image; give an intact file such as a PNG or a JPEG.") from None


def read_video(path: str, num_frames: int) -> list[Image.Image]:
    """Read frames of a video, spread evenly.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a readable video.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"No video {path}; give a file such as an MP4.")
    try:
        frames, _ = open_video(path, VideoSampling(num_frames))
    except BadRow as bad:
        raise ValueError(f"{path} is not a readable video ({bad}); give an intact file such as an MP4.") from None
    return [Image.fromarray(frame) for frame in frames]


def chat_inputs(processor: Any, media: Media, prompt: str) -> dict[str, Any]:
    """Build the inputs of a model for one question about images and videos.

    Args:
        processor: processor with a chat template.
        media: images and videos.
        prompt: question; `<image>` and `<video>` mark positions. Without a marker of a kind, all of that kind are
            placed first.

    Raises:
        ValueError: the question is empty, there is not one marker per image or video, or the processor cannot write
            such a prompt.
    """
    for marker, what, given in ((IMAGE_MARKER, "image", media.images), (VIDEO_MARKER, "video", media.videos)):
        found = prompt.count(marker)
        if found not in (0, len(given)):
            raise ValueError(
                f"The prompt has {found} {marker} for {len(given)} {what}{'' if len(given) == 1 else 's'}; give none, "
                f"or one for each."
            )
    videos = [list(frames) for frames in media.videos]
    return prompt_inputs(processor, prompt, media.images, videos, video=VideoSampling(None))
