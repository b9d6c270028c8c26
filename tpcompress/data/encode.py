"""From a row to token sequences, through the processor's own chat template.

The template is rendered up to every assistant turn, with the generation prompt, and up to its end; the difference is
what the model has to learn. This needs no ``{% generation %}`` mark in the template, only that a conversation's
rendering starts with the rendering of its beginning, which is checked.
"""

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from typing import Any

import torch

from tpcompress.data.rows import IMAGE_MARKER, BadRow, open_image

IGNORED = -100  # label of tokens that are not learnt: the value transformers' losses skip
_PROBE = "wxyzzy"
_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


@dataclass
class EncodedSequence:
    """One sequence of a batch, on its way from a row.

    `segments` and `positions` have an entry per token: segment 0 is the prefix shared by packed conversations, ``k``
    the k-th conversation. `images` is what the processor made of the row's images (``pixel_values`` and the like),
    shared, not copied, by the sequences of a row. `dropped` counts the conversations and answers cut by `max_length`.
    `content` is `content_id` of the sequence.
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
    content: str = ""


class ChatEncoder:
    """Turns conversations into ids and labels.

    Templates that leave an assistant turn without an end token (that of llava-1.5 does) cannot teach a model to stop:
    there the tokenizer's eos token is put behind every answer; `appended_end` tells.

    Args:
        processor: Processor with a fast tokenizer and a chat template.

    Raises:
        ValueError: If the processor lacks one of these, or a token to end an answer with, or if its model takes inputs
            beside ids and images.
    """

    def __init__(self, processor: Any) -> None:  # ProcessorMixin, whose attributes differ by class
        name = type(processor).__name__
        if not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
            raise ValueError(f"{name} has no fast tokenizer, whose offsets find the answers; load a fast one.")
        if not (processor.chat_template or processor.tokenizer.chat_template):
            raise ValueError(f"{name} has no chat template; set processor.chat_template to that of its model family.")
        if "mm_token_type_ids" in processor.model_input_names:
            raise ValueError(
                f"{name} wants mm_token_type_ids (multimodal positions), which are not made yet; use LLaVA's."
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_ids = frozenset(i for i in processor.image_token_ids if i is not None)
        self.content_parts = self._takes_parts()
        self.appended_end = self._missing_end()

    def images(self, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Process the images of a row, once.

        Returns:
            The model's inputs (``pixel_values`` (images, C, H, W) for most), and for each image the text of
            placeholders that stands for it.

        Raises:
            BadRow: If an image is missing or corrupt.
            ValueError: If the processor does not tell its placeholders.
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
                f"{type(self.processor).__name__} does not report the placeholders of its images; known to do so are "
                "the processors of transformers >= 5.23 that define replace_image_token, such as LlavaProcessor."
            )
        return {key: value for key, value in out.items() if key not in _TEXT_KEYS}, placeholders

    def conversation(self, messages: list[dict[str, str]], placeholders: list[str]) -> tuple[list[int], list[int]]:
        """Ids and labels of a whole conversation.

        Raises:
            BadRow: If the template is not prefix-stable on it, its images do not match its markers, or no token is
                left to learn.
        """
        pieces = self._pieces(self._templated(messages, len(placeholders)))
        ids, labels = self._tokenize(self._expand(pieces, placeholders))
        if all(label == IGNORED for label in labels):
            raise BadRow("no answer token")
        return ids, labels

    def prompt(self, messages: list[dict[str, str]], placeholders: list[str]) -> list[int]:
        """Ids of a conversation without its last assistant turn, up to where the model has to write it."""
        asked = self._templated(messages, len(placeholders))[:-1]
        text, past = self._render(asked, add_generation_prompt=True), asked[:-1]
        if not any(message["role"] == "assistant" for message in past):
            return self._tokenize(self._expand([(text, False)], placeholders))[0]
        pieces = self._pieces(past)  # past answers end as they did in training
        start = len(self._render(past))
        return self._tokenize(self._expand([*pieces, (text[start:], False)], placeholders))[0]

    def _templated(self, messages: list[dict[str, str]], num_images: int) -> list[dict[str, Any]]:
        """The messages as the template takes them; images without a marker go before the first user turn."""
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
            # Templates put their own separators around images; a marker's line break would double them.
            text = text.strip() if IMAGE_MARKER in content else text
            parts += [{"type": "text", "text": text}] if text else []
        return parts

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def _pieces(self, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        """The rendered conversation cut into (text, whether it is learnt)."""
        full, pieces, cursor = self._render(messages), [], 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:turn], True), self._render(messages[: turn + 1])
            if not (full.startswith(after) and after.startswith(before) and cursor <= len(before)):
                raise BadRow(
                    f"template not prefix-stable: turn {turn} changes with what follows; use one that only appends"
                )
            answer = after[len(before) :]
            learnt = answer.rstrip()
            pieces += [(full[cursor : len(before)], False), (learnt + self.appended_end, True)]
            pieces += [(answer[len(learnt) :], False)]
            cursor = len(after)
        return [*pieces, (full[cursor:], False)]

    def _expand(self, pieces: list[tuple[str, bool]], placeholders: list[str]) -> list[tuple[str, bool]]:
        """Write every image's placeholders where the template put its image token."""
        token, waiting, expanded = self.image_token, list(placeholders), []
        num_tokens = sum(text.count(token) for text, _ in pieces)
        if num_tokens != len(placeholders):
            raise BadRow(f"image markers: the template wrote {num_tokens} image tokens for {len(placeholders)} images")
        for text, learnt in pieces:
            head, *tails = text.split(token)
            expanded.append((head + "".join(waiting.pop(0) + tail for tail in tails), learnt))
        return expanded

    def _tokenize(self, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Tokenize the whole text at once: answers keep the merges they have in their context."""
        text, spans = "", []
        for piece, learnt in pieces:
            spans += [(len(text), len(text) + len(piece))] if learnt else []
            text += piece
        bos = self.tokenizer.bos_token
        out = self.tokenizer(
            text,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            verbose=False,  # length is the collator's business
        )
        labels = [IGNORED] * len(out["input_ids"])
        for index, (start, end) in enumerate(out["offset_mapping"]):
            # Overlap, not containment: a token may take the last blank of the prompt along.
            if any(start < last and end > first for first, last in spans):
                labels[index] = out["input_ids"][index]
        return out["input_ids"], labels

    def _takes_parts(self) -> bool:
        """Whether the template reads contents as lists of parts, or as plain strings."""
        try:
            text = self._render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}], True)
        except Exception:  # jinja and python errors alike: string + list
            return False
        return _PROBE in text and "'type'" not in text

    def _missing_end(self) -> str:
        """The token to put behind answers, empty if the template does so."""
        texts = {"user": "?", "assistant": _PROBE}
        turns = [{"role": role, "content": self._content(text)} for role, text in texts.items()]
        if self._render(turns).rpartition(_PROBE)[2].strip():
            return ""
        if self.tokenizer.eos_token is None:
            raise ValueError("The chat template ends no answer and the tokenizer has no eos_token; set one of them.")
        return self.tokenizer.eos_token


def identify(sequences: list[EncodedSequence]) -> list[EncodedSequence]:
    """Give the sequences of one row their `content`, a hash in 16 hexadecimal digits.

    It covers all that a model sees and learns of a sequence: ids, labels, segments and image inputs. So it is the same
    in any order, split or stream of the data, and another one as soon as the processor, the template, `max_length` or
    a picture changes what there is to see.
    """
    pictures = blake2b(digest_size=8)
    for name, value in sorted(sequences[0].images.items()) if sequences else ():
        pictures.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        pictures.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for sequence in sequences:
        digest = pictures.copy()
        for numbers in (sequence.input_ids, sequence.labels, sequence.segments):
            digest.update(array("q", [len(numbers), *numbers]).tobytes())
        sequence.content = digest.hexdigest()
    return sequences


def common_prefix(sequences: list[list[int]]) -> int:
    """Length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))
