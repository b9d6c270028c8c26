"""Collators that turn rows into model inputs: `ChatCollator` for training, `PromptCollator` for generation.

Shapes: B sequences in the batch, S tokens in the longest sequence.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from tpcompress.data.encode import IGNORED, ChatEncoder, EncodedSequence, common_prefix, set_content_ids
from tpcompress.data.rows import BadRow

Batch = dict[str, Any]


@dataclass
class BatchMeta:
    """Metadata of a batch that is not passed to the model; every list has one entry per sequence.

    Attributes:
        families: question families of the conversations of a sequence (one unless packed).
        answers: reference answers of these conversations: the content of the last assistant turn.
        rows: indices into the data set (into the batch if rows were collated directly; -1 in a stream).
        segments: int (B, S): 0 on the shared prefix of a packed sequence, k on its k-th conversation, -1 on padding.
        num_conversations: conversations in the batch.
        ids: hashes of the content of the sequences (see `encode.set_content_ids`), independent of order and run, so
            that values cached for a sequence can be found again.
        num_answers: predicted tokens in the batch: labels other than -100, without the first position of a sequence.
        dropped: conversations (packed) or sequences (not packed) that `max_length` truncated.
        bad_rows: `(row id, BadRow)` of the rows that were replaced by others.
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
    """Turns rows into training batches, padded on the right.

    A batch has `input_ids` (B, S), `labels` (B, S), the processor's image inputs such as `pixel_values` (absent if no
    row has an image), `attention_mask`, and `meta` (`BatchMeta`), which the caller pops. Labels are -100 except on
    answers and their end tokens. Images are processed once per row.

    Without `pack`, every conversation is a sequence of its own, and `attention_mask` (B, S) holds 0 and 1.

    With `pack`, a row is one sequence: the common prefix of its conversations, images included, followed by the
    remainder of each. `attention_mask` (B, 1, S, S) is boolean and causal, and each remainder attends to the prefix
    and itself; `position_ids` (B, S) continue from the prefix in every remainder, so that logits equal those of
    separate conversations. Requires `sdpa` attention: eager attention *adds* masks, and flash attention does not
    accept 4-d masks.

    Args:
        processor: processor with a chat template and a fast tokenizer.
        max_length: maximum sequence length in tokens. Longer conversations are truncated after their images and at
            least one answer token; packed sequences lose conversations from the end. Otherwise the row is bad.
        pack: one sequence per row instead of one per conversation.
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
            BadRow: a row is broken (`GoodRows` replaces such rows instead).
        """
        return self.pad([(self.encode(row, index), []) for index, row in enumerate(rows)])

    def encode(self, row: dict[str, Any], index: int = 0) -> list[EncodedSequence]:
        """Encode one row to its sequences; `GoodRows` calls this, and `pad` makes batches of the results."""
        images, placeholders = self.encoder.images(row["images"])
        sequences = []
        for messages, family in zip(row["conversations"], row["families"], strict=True):
            ids, labels = self.encoder.conversation(messages, placeholders)
            ones, positions, answer = [1] * len(ids), list(range(len(ids))), messages[-1]["content"]
            sequences.append(EncodedSequence(ids, labels, ones, positions, [family], [answer], images, index))
        return set_content_ids(
            [self._packed(sequences)] if self.packs else [self._cut(sequence) for sequence in sequences]
        )

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
        """Pack the conversations of a row into one sequence: the common prefix, then the remainder of each."""
        first_target = min(_first_target(c.labels) for c in conversations)
        # Each remainder starts with an unlabelled token, because its predecessor belongs to another conversation.
        prefix = min(common_prefix([c.input_ids for c in conversations]), first_target - 1)
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
        """Truncate a sequence to `max_length`, never inside its images or before its first answer token."""
        length, limit = len(sequence.input_ids), self.max_length
        if limit is None or length <= limit:
            return sequence
        needed = max(self._images_end(sequence.input_ids), _first_target(sequence.labels) + 1)
        if needed > limit:
            raise BadRow(f"too long: images and first answer token need {needed} tokens; raise max_length ({limit})")
        for name in ("input_ids", "labels", "segments", "positions"):
            setattr(sequence, name, getattr(sequence, name)[:limit])
        sequence.dropped = 1
        return sequence

    def _images_end(self, ids: list[int]) -> int:
        """Index after the last placeholder; 0 without images."""
        return max((index + 1 for index, token in enumerate(ids) if token in self.encoder.image_ids), default=0)


class PromptCollator:
    """Turns rows into prompts for generation, padded on the left: one per conversation, without its last answer.

    A batch has `input_ids` and `attention_mask` (B, S), the processor's image inputs, and `meta` (`BatchMeta`)
    with the reference answers.

    Args:
        processor: processor with a chat template and a fast tokenizer.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.encoder = ChatEncoder(processor)
        self.pad_id = pad_token_id(processor)

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Collate rows.

        Raises:
            BadRow: a row is broken.
        """
        return self.pad([(self.encode(row, index), []) for index, row in enumerate(rows)])

    def encode(self, row: dict[str, Any], index: int = 0) -> list[EncodedSequence]:
        """Encode one row to its prompts; `GoodRows` calls this, and `pad` makes batches of the results."""
        images, placeholders = self.encoder.images(row["images"])
        sequences = []
        for messages, family in zip(row["conversations"], row["families"], strict=True):
            ids = self.encoder.prompt(messages, placeholders)
            positions, answer = list(range(len(ids))), messages[-1]["content"]
            sequences.append(EncodedSequence(ids, [], [1] * len(ids), positions, [family], [answer], images, index))
        return set_content_ids(sequences)

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
    """Attention mask of packed sequences.

    Tokens attend to earlier tokens of the prefix (0) and of their own segment. Padding (-1) attends to itself only,
    because softmax over an empty set of keys returns nan.

    Args:
        segments: int (B, S): segment ids.

    Returns:
        bool (B, 1, S, S): True where a query attends to a key.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    order = torch.arange(segments.shape[1], device=segments.device)
    earlier = order[:, None] >= order[None, :]
    visible = ((key == 0) | (key == query)) & (query >= 0) & (key >= 0) & earlier
    return (visible | (order[:, None] == order[None, :]))[:, None]


def pad_token_id(processor: ProcessorMixin) -> int:
    """The tokenizer's padding id, or its eos id if it has none; padding is masked and has no labels.

    Raises:
        ValueError: the tokenizer has neither.
    """
    tokenizer = processor.tokenizer
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise ValueError("The tokenizer has neither pad_token nor eos_token; set processor.tokenizer.pad_token.")
    return pad_id


def _first_target(labels: list[int]) -> int:
    return next(index for index, label in enumerate(labels) if label != IGNORED)


def _padded(lists: list[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(len(items) for items in lists)
    fills = [[value] * (width - len(items)) for items in lists]
    return torch.tensor([fill + items if left else items + fill for items, fill in zip(lists, fills, strict=True)])


def _joined_images(sequences: list[EncodedSequence]) -> dict[str, Tensor]:
    """Concatenate the image inputs of all sequences."""
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
        ids=[sequence.content_id for sequence in sequences],
        num_answers=sum(label != IGNORED for sequence in sequences for label in sequence.labels[1:]),
        dropped=sum(sequence.dropped for sequence in sequences),
        bad_rows=bad_rows,
    )
