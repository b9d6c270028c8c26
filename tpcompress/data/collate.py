"""Collators: rows to what a model's ``forward`` takes, for training and for generation.

Shapes: B sequences, S tokens of the longest.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from tpcompress.data.encode import IGNORED, ChatEncoder, EncodedSequence, common_prefix, identify
from tpcompress.data.rows import BadRow

Batch = dict[str, Any]


@dataclass
class BatchMeta:
    """What a batch knows beside the model's inputs; every list has one entry per sequence.

    `families` and `answers` list the conversations of a sequence (one unless packed): the question family, and the
    reference answer, which is the content of the last assistant turn. `rows` are indices into the data set (into the
    batch if rows were collated directly; -1 in a stream). `ids` identify the sequences by their content, see
    `encode.identify`: the same in every order and run, so that what was computed about one can be found again.
    `num_answers` counts the tokens to predict in the whole batch: labels that are not -100, without the first position,
    which nothing predicts. `segments` (B, S) is 0 on a packed sequence's shared prefix, k on its k-th
    conversation, -1 on padding. `num_conversations` counts the batch. `dropped` counts what `max_length` cut:
    conversations of packed sequences, otherwise sequences cut short. `bad_rows` lists ``(row id, BadRow)`` of the
    rows that others stood in for.
    """

    families: list[list[str]]
    answers: list[list[str]]
    rows: list[int]
    segments: Tensor
    num_conversations: int
    ids: list[str] = field(default_factory=list)
    num_answers: int = 0
    dropped: int = 0
    bad_rows: list[tuple[str, BadRow]] = field(default_factory=list)


class ChatCollator:
    """Rows to training batches, padded on the right.

    A batch has ``input_ids`` (B, S), ``labels`` (B, S), the processor's image inputs such as ``pixel_values``
    (absent if no row has an image), ``attention_mask`` and, for the caller to pop, ``meta`` (`BatchMeta`). Labels are
    -100 but on answers and the tokens that end them. Images are processed once per row.

    Without `pack` every conversation is a sequence of its own and ``attention_mask`` is (B, S) of 0 and 1.

    With `pack` a row is one sequence: the tokens that all its conversations start with, images included, then the
    rest of each. ``attention_mask`` (B, 1, S, S) is boolean, causal, and lets each rest see the prefix and itself;
    ``position_ids`` (B, S) go on from the prefix in every rest, so logits equal those of separate conversations. Use
    with ``sdpa`` attention: eager attention *adds* masks, and flash attention takes none of four dimensions.

    Args:
        processor: Processor with a chat template and a fast tokenizer.
        max_length: Longest sequence in tokens. Longer conversations are cut behind their images, keeping at least one
            answer token; packed sequences lose conversations from the end. What cannot be cut so is a bad row.
        pack: One sequence per row instead of one per conversation.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int | None = None, pack: bool = False) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {max_length}.")
        self.encoder = ChatEncoder(processor)
        self.max_length = max_length
        self.packs = pack
        self.pad_id = pad_token_id(processor)

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Collate rows.

        Raises:
            BadRow: If a row is broken; inside a `GoodRows` such a row gives way to another instead.
        """
        return self.pad([(self.encode(row, index), []) for index, row in enumerate(rows)])

    def encode(self, row: dict[str, Any], index: int = 0) -> list[EncodedSequence]:
        """The sequences of one row, for `GoodRows`; `pad` makes batches of them."""
        images, placeholders = self.encoder.images(row["images"])
        sequences = []
        for messages, family in zip(row["conversations"], row["families"], strict=True):
            ids, labels = self.encoder.conversation(messages, placeholders)
            ones, positions, answer = [1] * len(ids), list(range(len(ids))), messages[-1]["content"]
            sequences.append(EncodedSequence(ids, labels, ones, positions, [family], [answer], images, index))
        return identify([self._packed(sequences)] if self.packs else [self._cut(sequence) for sequence in sequences])

    def pad(self, samples: list[tuple[list[EncodedSequence], list[tuple[str, BadRow]]]]) -> Batch:
        """Batch of encoded rows, each with the bad rows it stands in for."""
        sequences = [sequence for sample, _ in samples for sequence in sample]
        batch: Batch = {
            "input_ids": _padded([s.input_ids for s in sequences], self.pad_id),
            "labels": _padded([s.labels for s in sequences], IGNORED),
        }
        segments = _padded([s.segments for s in sequences], -1)
        if self.packs:
            batch["attention_mask"] = packed_mask(segments)
            batch["position_ids"] = _padded([s.positions for s in sequences], 0)
        else:
            batch["attention_mask"] = (segments >= 0).long()
        batch |= _joined_images(sequences)
        return batch | {"meta": _meta(sequences, segments, [bad for _, passed_over in samples for bad in passed_over])}

    def _packed(self, conversations: list[EncodedSequence]) -> EncodedSequence:
        """One sequence of a row's conversations: the shared prefix, then the rest of each."""
        first_learnt = min(_first_learnt(c.labels) for c in conversations)
        # Every rest starts with a token that is not learnt: the one before it in the sequence belongs to another.
        prefix = min(common_prefix([c.input_ids for c in conversations]), first_learnt - 1)
        first = conversations[0]
        if max(self._images_end(c.input_ids) for c in conversations) > prefix:
            raise BadRow("conversations differ before their images end; put the images first, or set pack to false")
        ids, labels, positions = first.input_ids[:prefix], first.labels[:prefix], first.positions[:prefix]
        packed = EncodedSequence(ids, labels, [0] * prefix, positions, [], [], first.images, first.row)
        for number, conversation in enumerate(conversations, start=1):
            rest = len(conversation.input_ids) - prefix
            if self.max_length is not None and len(packed.input_ids) + rest > self.max_length:
                packed.dropped = len(conversations) - number + 1
                break
            packed.input_ids += conversation.input_ids[prefix:]
            packed.labels += conversation.labels[prefix:]
            packed.segments += [number] * rest
            packed.positions += conversation.positions[prefix:]
            packed.families += conversation.families
            packed.answers += conversation.answers
        if not packed.families:
            raise BadRow(
                f"too long: one conversation needs {prefix + rest} tokens; raise max_length ({self.max_length})"
            )
        return packed

    def _cut(self, sequence: EncodedSequence) -> EncodedSequence:
        """Cut a sequence to `max_length`, never inside its images nor before its first answer token."""
        length, limit = len(sequence.input_ids), self.max_length
        if limit is None or length <= limit:
            return sequence
        needed = max(self._images_end(sequence.input_ids), _first_learnt(sequence.labels) + 1)
        if needed > limit:
            raise BadRow(f"too long: images and first answer token need {needed} tokens; raise max_length ({limit})")
        for name in ("input_ids", "labels", "segments", "positions"):
            setattr(sequence, name, getattr(sequence, name)[:limit])
        sequence.dropped = 1
        return sequence

    def _images_end(self, ids: list[int]) -> int:
        """Index behind the last placeholder, 0 without images."""
        return max((index + 1 for index, token in enumerate(ids) if token in self.encoder.image_ids), default=0)


class PromptCollator:
    """Rows to prompts for generation, padded on the left: one per conversation, up to its last answer.

    A batch has ``input_ids`` and ``attention_mask`` (B, S), the processor's image inputs, and ``meta`` (`BatchMeta`)
    with the reference answers.

    Args:
        processor: Processor with a chat template and a fast tokenizer.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.encoder = ChatEncoder(processor)
        self.pad_id = pad_token_id(processor)

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Collate rows.

        Raises:
            BadRow: If a row is broken.
        """
        return self.pad([(self.encode(row, index), []) for index, row in enumerate(rows)])

    def encode(self, row: dict[str, Any], index: int = 0) -> list[EncodedSequence]:
        """The prompts of one row, for `GoodRows`; `pad` makes batches of them."""
        images, placeholders = self.encoder.images(row["images"])
        sequences = []
        for messages, family in zip(row["conversations"], row["families"], strict=True):
            ids = self.encoder.prompt(messages, placeholders)
            positions, answer = list(range(len(ids))), messages[-1]["content"]
            sequences.append(EncodedSequence(ids, [], [1] * len(ids), positions, [family], [answer], images, index))
        return identify(sequences)

    def pad(self, samples: list[tuple[list[EncodedSequence], list[tuple[str, BadRow]]]]) -> Batch:
        """Batch of encoded rows, each with the bad rows it stands in for."""
        sequences = [sequence for sample, _ in samples for sequence in sample]
        segments = _padded([s.segments for s in sequences], -1, left=True)
        batch = {
            "input_ids": _padded([s.input_ids for s in sequences], self.pad_id, left=True),
            "attention_mask": (segments >= 0).long(),
        }
        batch |= _joined_images(sequences)
        return batch | {"meta": _meta(sequences, segments, [bad for _, passed_over in samples for bad in passed_over])}


def packed_mask(segments: Tensor) -> Tensor:
    """Boolean mask (B, 1, S, S) of packed sequences from their segment ids (B, S); True where a query may look.

    Tokens see earlier ones of the prefix (0) and of their own segment. Padding (-1) sees itself only, as a query
    without any key makes softmax return nan.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    order = torch.arange(segments.shape[1], device=segments.device)
    earlier = order[:, None] >= order[None, :]
    visible = ((key == 0) | (key == query)) & (query >= 0) & (key >= 0) & earlier
    return (visible | (order[:, None] == order[None, :]))[:, None]


def pad_token_id(processor: ProcessorMixin) -> int:
    """Id to pad with: the tokenizer's, or its eos where it has none (padding is neither seen nor learnt)."""
    tokenizer = processor.tokenizer
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise ValueError("The tokenizer has neither pad_token nor eos_token; set processor.tokenizer.pad_token.")
    return pad_id


def _first_learnt(labels: list[int]) -> int:
    return next(index for index, label in enumerate(labels) if label != IGNORED)


def _padded(lists: list[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(len(items) for items in lists)
    fills = [[value] * (width - len(items)) for items in lists]
    return torch.tensor([fill + items if left else items + fill for items, fill in zip(lists, fills, strict=True)])


def _joined_images(sequences: list[EncodedSequence]) -> dict[str, Tensor]:
    """Image inputs of all sequences, one after another."""
    owners = [sequence.images for sequence in sequences if sequence.images]
    joined = {}
    for name in owners[0] if owners else ():
        shapes = {tuple(images[name].shape[1:]) for images in owners}
        if len(shapes) > 1:
            raise ValueError(f"{name} of a batch differ in shape: {shapes}; use batch_size 1 with this processor.")
        joined[name] = torch.cat([images[name] for images in owners])
    return joined


def _meta(sequences: list[EncodedSequence], segments: Tensor, bad_rows: list[tuple[str, BadRow]]) -> BatchMeta:
    return BatchMeta(
        families=[sequence.families for sequence in sequences],
        answers=[sequence.answers for sequence in sequences],
        rows=[sequence.row for sequence in sequences],
        segments=segments,
        num_conversations=sum(len(sequence.families) for sequence in sequences),
        ids=[sequence.content for sequence in sequences],
        num_answers=sum(label != IGNORED for sequence in sequences for label in sequence.labels[1:]),
        dropped=sum(sequence.dropped for sequence in sequences),
        bad_rows=bad_rows,
    )
