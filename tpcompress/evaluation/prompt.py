"""Build the model inputs of one image and one question with the processor's own chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from tpcompress.data.rows import IMAGE_MARKER, BadRow, open_image


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


def chat_inputs(processor: Any, image: Image.Image, prompt: str) -> dict[str, Any]:
    """Build the inputs of a model for one image and one question.

    Args:
        processor: processor with a chat template.
        image: one image.
        prompt: question; `<image>` marks the position of the image, which is otherwise placed first.

    Raises:
        ValueError: the question is empty, there are several markers, or the chat template is missing or cannot render
            an image.
    """
    before, marker, after = prompt.partition(IMAGE_MARKER)
    if not (before + after).strip():
        raise ValueError(f"The prompt {prompt!r} is empty; give a question such as 'What is this?'.")
    if IMAGE_MARKER in after:
        raise ValueError(f"The prompt has {prompt.count(IMAGE_MARKER)} {IMAGE_MARKER} for one image; give at most one.")
    text = _render(processor, before, after) if marker else _render(processor, "", prompt)
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    return dict(processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special))


def _render(processor: Any, before: str, after: str) -> str:
    """Render the question with the chat template, which takes either a list of parts or a string with image tokens."""
    name = type(processor).__name__
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ValueError(f"{name} has no chat template; set processor.chat_template to that of its model family.")
    texts = [text.strip() for text in (before, after)]
    first, last = ([{"type": "text", "text": text}] if text else [] for text in texts)
    for content in ([*first, {"type": "image"}, *last], f"{before}{processor.image_token}\n{after}".strip()):
        turn = {"role": "user", "content": content}
        try:
            text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        except Exception:  # templates for strings raise jinja or Python errors of any type when given a list
            continue
        if "'type'" not in text and all(words in text for words in texts):
            return str(text)
    raise ValueError(f"The chat template of {name} does not render an image and a text; set that of its model family.")
