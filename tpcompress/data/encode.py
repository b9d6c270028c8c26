"""Encode a row to token ids and labels with the processor's own chat template.

For every assistant turn the template is rendered up to the turn, with the generation prompt, and up to its end; the
difference is labelled. The template needs no `{% generation %}` marks, but must be prefix-stable: the rendering of a
conversation starts with the rendering of its first turns. This is checked.
"""

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from typing import Any

import torch

from tpcompress.data.rows import IMAGE_MARKER, BadRow, open_image

IGNORED = -100  # label that the losses of transformers ignore
_PROBE = "wxyzzy"
_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


@dataclass
class EncodedSequence:
    """One encoded sequence before padding.

    Attributes:
        input_ids, labels: one entry per token.
        segments: one entry per token: 0 on the common prefix of packed conversations, k on the k-th conversation.
        positions: position id of every token.
        families, answers: question family and reference answer of each conversation.
        images: image inputs from the processor (`pixel_values` etc.), shared, not copied, by the sequences of a row.
        row: index of the row in the data set.
        dropped: conversations and answers that `max_length` truncated.
        content_id: hash of the content, see `set_content_ids`.
    """

    input_ids: list[int]
    labels: list[int]
    segments: list[int]
    positions: list[int]
    families: list[str]
    answers: list[str]
    images: dict[str, torch.Tensor] = field(default_factory=dict)
    row: int = 0
    dropped: int = 0
    content_id: str = ""


class ChatEncoder:
    """Encodes conversations to ids and labels.

    If the template does not end assistant turns with an end token (that of llava-1.5 does not), the model would not
    learn to stop; the tokenizer's eos token is then appended to every answer (`appended_end`).

    Args:
        processor: processor with a fast tokenizer and a chat template.

    Raises:
        ValueError: the processor has no fast tokenizer, no chat template or no token to end an answer with, or its
            model requires inputs other than ids and images.
    """

    def __init__(self, processor: Any) -> None:  # a ProcessorMixin; its attributes differ by class
        name = type(processor).__name__
        if not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
            raise ValueError(f"{name} has no fast tokenizer; load one, as labels require its character offsets.")
        if not (processor.chat_template or processor.tokenizer.chat_template):
            raise ValueError(f"{name} has no chat template; set processor.chat_template to that of its model family.")
        if "mm_token_type_ids" in processor.model_input_names:
            raise ValueError(
                f"{name} requires mm_token_type_ids (multimodal positions), which are not supported; use LLaVA's."
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_ids = frozenset(i for i in processor.image_token_ids if i is not None)
        self.content_parts = self._takes_parts()
        self.appended_end = self._missing_end()

    def images(self, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Process the images of a row.

        Returns:
            the model's image inputs (for most models `pixel_values` (images, C, H, W)), and the placeholder text of
            each image.

        Raises:
            BadRow: an image is missing or corrupt.
            ValueError: the processor does not return its placeholders.
        """
        if not images:
            return {}, []
        out = self.processor(
            text=[self.image_token * len(images)],
            images=[open_image(image) for image in images],
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        placeholders = [part["replacement"] for part in out.get("text_replacement_offsets", [[]])[0]]
        if len(placeholders) != len(images):
            raise ValueError(
                f"{type(self.processor).__name__} does not return the placeholders of its images; use a processor of "
                "transformers >= 5.23 that defines replace_image_token, such as LlavaProcessor."
            )
        return {key: value for key, value in out.items() if key not in _TEXT_KEYS}, placeholders

    def conversation(self, messages: list[dict[str, str]], placeholders: list[str]) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation.

        Raises:
            BadRow: the template is not prefix-stable on it, images and markers do not match, or no token is labelled.
        """
        pieces = self._pieces(self._templated(messages, len(placeholders)))
        ids, labels = self._tokenize(self._expand(pieces, placeholders))
        if all(label == IGNORED for label in labels):
            raise BadRow("no answer token")
        return ids, labels

    def prompt(self, messages: list[dict[str, str]], placeholders: list[str]) -> list[int]:
        """Ids of a conversation without its last assistant turn, with the generation prompt."""
        turns = self._templated(messages, len(placeholders))[:-1]
        text, past = self._render(turns, add_generation_prompt=True), turns[:-1]
        if not any(message["role"] == "assistant" for message in past):
            return self._tokenize(self._expand([(text, False)], placeholders))[0]
        pieces = self._pieces(past)  # past answers get the same end token as in training
        start = len(self._render(past))
        return self._tokenize(self._expand([*pieces, (text[start:], False)], placeholders))[0]

    def _templated(self, messages: list[dict[str, str]], num_images: int) -> list[dict[str, Any]]:
        """The messages in the template's format; images without a marker are placed before the first user turn."""
        markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
        missing, templated = num_images if markers == 0 else 0, []
        for message in messages:
            content = message["content"]
            if missing and message["role"] == "user":
                content, missing = f"{IMAGE_MARKER}\n" * missing + content, 0
            templated.append({"role": message["role"], "content": self._content(content)})
        return templated

    def _content(self, content: str) -> str | list[dict[str, str]]:
        if not self.content_parts:
            return content.replace(IMAGE_MARKER, self.image_token)
        parts: list[dict[str, str]] = []
        for number, text in enumerate(content.split(IMAGE_MARKER)):
            parts += [{"type": "image"}] if number else []
            # Templates add their own separators around images; line breaks beside a marker would double them.
            text = text.strip() if IMAGE_MARKER in content else text
            parts += [{"type": "text", "text": text}] if text else []
        return parts

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def _pieces(self, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        """The rendered conversation, split into (text, whether it is labelled)."""
        full, pieces, cursor = self._render(messages), [], 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:turn], True), self._render(messages[: turn + 1])
            if not (full.startswith(after) and after.startswith(before) and cursor <= len(before)):
                raise BadRow(
                    f"template not prefix-stable: turn {turn} depends on later turns; use one that only appends"
                )
            answer = after[len(before) :]
            labelled = answer.rstrip()
            pieces += [(full[cursor : len(before)], False), (labelled + self.appended_end, True)]
            pieces += [(answer[len(labelled) :], False)]
            cursor = len(after)
        return [*pieces, (full[cursor:], False)]

    def _expand(self, pieces: list[tuple[str, bool]], placeholders: list[str]) -> list[tuple[str, bool]]:
        """Replace every image token that the template rendered by the placeholders of that image."""
        token, waiting, expanded = self.image_token, list(placeholders), []
        num_tokens = sum(text.count(token) for text, _ in pieces)
        if num_tokens != len(placeholders):
            raise BadRow(f"image markers: the template wrote {num_tokens} image tokens for {len(placeholders)} images")
        for text, labelled in pieces:
            head, *tails = text.split(token)
            expanded.append((head + "".join(waiting.pop(0) + tail for tail in tails), labelled))
        return expanded

    def _tokenize(self, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Tokenize all pieces as one text, so that answers are tokenized as in their context."""
        text, spans = "", []
        for piece, labelled in pieces:
            spans += [(len(text), len(text) + len(piece))] if labelled else []
            text += piece
        bos = self.tokenizer.bos_token
        out = self.tokenizer(
            text,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            verbose=False,  # no warning about the length: the collator truncates
        )
        labels = [IGNORED] * len(out["input_ids"])
        for index, (start, end) in enumerate(out["offset_mapping"]):
            # Overlap, not containment: a token may include the last blank of the prompt.
            if any(start < last and end > first for first, last in spans):
                labels[index] = out["input_ids"][index]
        return out["input_ids"], labels

    def _takes_parts(self) -> bool:
        """Whether the template reads contents as lists of parts rather than as plain strings."""
        try:
            text = self._render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}], True)
        except Exception:  # jinja and python errors alike: string + list
            return False
        return _PROBE in text and "'type'" not in text

    def _missing_end(self) -> str:
        """The token to append to answers; empty if the template ends them itself."""
        texts = {"user": "?", "assistant": _PROBE}
        turns = [{"role": role, "content": self._content(text)} for role, text in texts.items()]
        if self._render(turns).rpartition(_PROBE)[2].strip():
            return ""
        if self.tokenizer.eos_token is None:
            raise ValueError("The chat template ends no answer and the tokenizer has no eos_token; set one of them.")
        return self.tokenizer.eos_token


def set_content_ids(sequences: list[EncodedSequence]) -> list[EncodedSequence]:
    """Set `content` of the sequences of one row: a hash in 16 hexadecimal digits.

    The hash covers ids, labels, segments and image inputs. It does not depend on the order, split or streaming of the
    data, and changes if the processor, the template, `max_length` or an image changes the sequence.
    """
    image_digest = blake2b(digest_size=8)
    for name, value in sorted(sequences[0].images.items()) if sequences else ():
        image_digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        image_digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for sequence in sequences:
        digest = image_digest.copy()
        for numbers in (sequence.input_ids, sequence.labels, sequence.segments):
            digest.update(array("q", [len(numbers), *numbers]).tobytes())
        sequence.content_id = digest.hexdigest()
    return sequences


def common_prefix(sequences: list[list[int]]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))
