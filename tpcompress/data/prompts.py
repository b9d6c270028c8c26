"""Model inputs of one prompt."""

from collections.abc import Sequence
from typing import Any

from tpcompress.data.collate import Batch, PromptCollator
from tpcompress.data.rows import BadRow
from tpcompress.data.video import VideoSampling


def prompt_inputs(
    processor: Any,
    prompt: str,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    *,
    video: VideoSampling | None = None,
) -> Batch:
    """Inputs of a model for one question about images and videos, as the collators make them.

    Args:
        processor: processor with a chat template.
        prompt: question; `<image>` and `<video>` mark the positions of the media, which otherwise come first.
        images: images, as in rows.
        videos: videos, as in rows.
        video: how videos are sampled; None for the defaults of `VideoSampling`.

    Returns:
        the inputs, without `meta`.

    Raises:
        ValueError: the question is empty, an image or video cannot be read, or the processor takes no such prompt.
    """
    text = prompt.replace("<image>", "").replace("<video>", "")
    if not text.strip():
        raise ValueError(f"The prompt {prompt!r} is empty; give a question such as 'What is this?'.")
    row = {
        "images": list(images), "videos": list(videos), "families": ["prompt"],
        "conversations": [[{"role": "user", "content": prompt}]],
    }  # fmt: skip
    try:
        batch = PromptCollator(processor, video=video)([row])
    except BadRow as bad:
        raise ValueError(f"The prompt {prompt!r} cannot be encoded: {bad}.") from None
    return {name: value for name, value in batch.items() if name != "meta"}
