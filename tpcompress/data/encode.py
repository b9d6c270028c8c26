"""Encode a row to the inputs that its processor makes of it, with labels on the answers."""

import copy
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from xxhash import xxh3_64

from tpcompress.data.answers import tools_of
from tpcompress.data.joining import TEXT_KEYS, Layout, learn_layout
from tpcompress.data.processing import Media, Processed, RowProcessor, open_media
from tpcompress.data.rows import BadRow
from tpcompress.data.suffix import text_format
from tpcompress.data.template import MARKERS, LearnFrom, Rendered
from tpcompress.data.video import VideoSampling

IGNORED = -100  # label that the losses of transformers ignore
_LAYOUTS: WeakKeyDictionary[Any, tuple[Any, Layout]] = WeakKeyDictionary()


@dataclass
class EncodedSequence:
    """One encoded sequence before padding.

    Attributes:
        input_ids, labels: one entry per token.
        segments: one entry per token: 0 on the common prefix of packed conversations, k on the k-th conversation.
        positions: position id of every token.
        families, answers: question family and reference answer of each conversation.
        images: inputs of images and videos from the processor (`pixel_values` etc.), shared, not copied, by the
            sequences of a row.
        row: index of the row in the data set.
        dropped: conversations and answers that `max_length` truncated.
        content_id: hash of the content, see `set_content_ids`.
        tokens: further inputs with one entry per token, such as `mm_token_type_ids`.
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
    tokens: dict[str, list[int]] = field(default_factory=dict)


class ChatEncoder:
    """Encodes the conversations of rows by calling their processor.

    Args:
        processor: processor with a fast tokenizer and a chat template (or a `suffix`, as PaliGemma's).
        learn_from: `all` answers of a conversation, or the `last` one only.
        video: how videos are sampled; None for the defaults of `VideoSampling`.

    Attributes:
        appended_end: token that is appended to answers, where the template does not end them.
        layout: how the inputs of several sequences are joined.

    Raises:
        ValueError: the processor has no fast tokenizer, no usable chat template or no token to end an answer with, or
            makes inputs that cannot be joined to batches.
    """

    def __init__(self, processor: Any, learn_from: LearnFrom = "all", video: VideoSampling | None = None) -> None:
        self.name = type(processor).__name__
        if not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
            raise ValueError(f"{self.name} has no fast tokenizer; load one, as labels require its character offsets.")
        self.processor = processor  # a ProcessorMixin; its attributes differ by class
        self.tokenizer = processor.tokenizer
        self.video = video
        ids = [*getattr(processor, "image_token_ids", []), *getattr(processor, "video_token_ids", [])]
        self.image_ids = frozenset(i for i in ids if i is not None)
        self.format = text_format(processor, learn_from)
        self.appended_end = self.format.appended_end
        self.pad_id = pad_token_id(processor)
        self.layout = self._layout()
        self._process = RowProcessor(processor, self.layout.nested)

    def row(self, row: Mapping[str, Any], index: int = 0, prompt: bool = False) -> list[EncodedSequence]:
        """Encode one row.

        Args:
            row: the row.
            index: its index in the data set.
            prompt: leave out the last answer of each conversation and the labels, and start an answer instead.

        Returns:
            one sequence per conversation, without content ids.

        Raises:
            BadRow: the row cannot be encoded.
        """
        sequences: list[EncodedSequence] = []
        media, tools = self.open(row), tools_of(row)
        try:
            for messages, family in zip(row["conversations"], row["families"], strict=True):
                shown = messages[:-1] if prompt and messages[-1]["role"] == "assistant" else messages
                rendered = self.format.conversation(shown, media.counts, tools, prompt)
                sequence = self._encoded(rendered, media)
                sequence.families, sequence.answers, sequence.row = [family], [messages[-1]["content"]], index
                if prompt:
                    sequence.labels = []
                elif all(label == IGNORED for label in sequence.labels):
                    raise BadRow("no answer token")
                if sequences:
                    sequence.images = sequences[0].images
                sequences.append(sequence)
        finally:
            self._process.forget()
        return sequences

    def open(self, row: Mapping[str, Any]) -> Media:
        """Open the media of a row.

        Raises:
            BadRow: one is missing or corrupt, or the processor takes none of the kind.
        """
        if row.get("videos") and "video" in self.layout.refused:
            raise BadRow(f"no video support: {self.layout.refused['video']}")
        return open_media(row, self.video)

    def vision_tokens(self, row: Mapping[str, Any]) -> int:
        """Number of placeholders of the media of a row.

        Raises:
            BadRow: one is missing or corrupt, or the processor refuses it.
        """
        media = self.open(row)
        if not any(media.counts.values()):
            return 0
        rendered = self._probe_text(media.counts)
        try:
            ids = self._process(rendered.text, media, **_listed(rendered)).values["input_ids"][0].tolist()
        finally:
            self._process.forget()
        return sum(token in self.image_ids for token in ids)

    def _encoded(self, rendered: Rendered, media: Media) -> EncodedSequence:
        text, counts = rendered.text, media.counts
        for kind, number in counts.items():
            token = getattr(self.processor, f"{kind}_token", None)
            if token and text.count(token) != number:
                raise BadRow(f"{kind} markers: the template wrote {text.count(token)} {kind} tokens for {number}")
            if number and not token:
                raise BadRow(f"no {kind} support: {self.name} has no {kind} token")
        made = self._process(text, media, **_listed(rendered))
        values = made.values
        ids = values["input_ids"][0].tolist()
        labels = values["labels"][0].tolist() if "labels" in values else self._labels(rendered, made, ids)
        known = {*TEXT_KEYS, *self.layout.tokens}
        return EncodedSequence(
            ids, labels, [1] * len(ids), list(range(len(ids))), [], [],
            images={name: value for name, value in values.items() if name not in known},
            tokens={name: values[name][0].tolist() for name in self.layout.tokens},
        )  # fmt: skip

    def _labels(self, rendered: Rendered, made: Processed, ids: list[int]) -> list[int]:
        """Labels of the tokens that overlap what is learned."""
        labels, cursor, past, first = [IGNORED] * len(ids), 0, 0, 0
        tokens = [getattr(self.processor, f"{kind}_token", None) for kind in MARKERS]
        for start, stop in rendered.spans:
            # The text from the last placeholder on stands unchanged in the text that was tokenized.
            since = past
            for token in filter(None, tokens):
                at = rendered.text.rfind(token, past, start)
                since = max(since, at + len(token)) if at >= 0 else since
            found = made.text.find(rendered.text[since:stop], cursor)
            if found < 0:
                raise BadRow(f"{self.name} rewrites the text of the answer")
            begin, cursor, past = found + start - since, found + stop - since, stop
            # Overlap, not containment: a token may include the last blank of the prompt.
            for index in range(first, len(ids)):
                token_start, token_stop = made.offsets[index]
                if token_start >= cursor:
                    break
                first = index
                if token_start < cursor and token_stop > begin:
                    labels[index] = ids[index]
        return labels

    def _layout(self) -> Layout:
        """The layout of the processor, which is learned once."""
        key = (self.processor.chat_template, self.pad_id, id(getattr(self.processor, "image_processor", None)))
        if self.processor not in _LAYOUTS or _LAYOUTS[self.processor][0] != key:
            probed = self.processor
            if self.tokenizer.pad_token_id is None:  # the probe pads
                probed = copy.copy(self.processor)
                probed.tokenizer = copy.deepcopy(self.tokenizer)
                probed.tokenizer.pad_token = self.tokenizer.eos_token
            _LAYOUTS[self.processor] = (key, learn_layout(probed, self.name, self._probe_text))
        return _LAYOUTS[self.processor][1]

    def _probe_text(self, counts: dict[str, int]) -> Rendered:
        content = "".join(marker * counts[kind] for kind, marker in MARKERS.items()) + "?"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
        return self.format.conversation(messages, counts)


def pad_token_id(processor: Any) -> int:
    """The tokenizer's padding id, or its eos id if it has none; padding is masked and has no labels.

    Raises:
        ValueError: the tokenizer has neither.
    """
    tokenizer = processor.tokenizer
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise ValueError("The tokenizer has neither pad_token nor eos_token; set processor.tokenizer.pad_token.")
    return pad_id


def set_content_ids(sequences: list[EncodedSequence]) -> list[EncodedSequence]:
    """Set `content_id` of the sequences of one row: a hash in 16 hexadecimal digits.

    The hash covers all inputs, labels and segments. It does not depend on the order, split or streaming of the data,
    and changes if the processor, the template, `max_length` or an image changes the sequence.
    """
    images = xxh3_64()  # blake2b takes as long as some processors
    for name, value in sorted(sequences[0].images.items()) if sequences else ():
        images.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        images.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for sequence in sequences:
        digest = images.copy()
        further = [sequence.tokens[name] for name in sorted(sequence.tokens)]
        for numbers in (sequence.input_ids, sequence.labels, sequence.segments, *further):
            digest.update(array("q", [len(numbers), *numbers]).tobytes())
        sequence.content_id = digest.hexdigest()
    return sequences


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def _listed(rendered: Rendered) -> dict[str, list[Any]]:
    return {name: [value] for name, value in rendered.more.items()}
