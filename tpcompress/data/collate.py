"""Collators that turn rows into model inputs: `ChatCollator` for training, `PromptCollator` for generation.

Shapes: B sequences in the batch, S tokens in the longest sequence.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from tpcompress.data.encode import IGNORED, ChatEncoder, EncodedSequence, set_content_ids
from tpcompress.data.packing import cut, filled, laid_out, packed, packed_mask, why_not_packed
from tpcompress.data.rows import BadRow
from tpcompress.data.template import LearnFrom
from tpcompress.data.video import VideoSampling

Batch = dict[str, Any]


@dataclass
class BatchMeta:
    """Metadata of a batch that is not passed to the model; every list has one entry per sequence.

    Attributes:
        families: question families of the conversations of a sequence (one unless packed).
        answers: reference answers of these conversations: the content of the last assistant turn.
        rows: indices into the data set (into the batch if rows were collated directly; -1 in a stream); of the first
            row where a sequence holds several.
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

    A batch has everything that the processor returns for these conversations, as the processor itself batches it:
    `input_ids` (B, S), `attention_mask`, further inputs per token such as `mm_token_type_ids` (B, S), and the inputs
    of images and videos such as `pixel_values` (absent if no row has any). To these it adds `labels` (B, S), which are
    -100 except on answers and their end tokens, and `meta` (`BatchMeta`), which the caller pops. Images are processed
    once per row.

    Without `pack`, every conversation is a sequence of its own, and `attention_mask` (B, S) holds 0 and 1.

    With `pack`, a row is one sequence: the common prefix of its conversations, images included, followed by the
    remainder of each. `attention_mask` (B, 1, S, S) is boolean and causal, and each remainder attends to the prefix
    and itself; `position_ids` (B, S) continue from the prefix in every remainder, so that logits equal those of
    separate conversations. Requires `sdpa` attention: eager attention *adds* masks, and flash attention does not
    accept 4-d masks.

    With `pack_sequences`, the conversations of a batch, each with its images, are laid one after the other into as few
    sequences of at most `max_length` tokens as they fit in (first fit), under the same mask.

    Args:
        processor: processor with a fast tokenizer and a chat template (or a `suffix`, as PaliGemma's).
        max_length: maximum sequence length in tokens. Longer conversations are truncated after their images and at
            least one answer token; packed sequences lose conversations from the end. Otherwise the row is bad.
        pack: one sequence per row instead of one per conversation.
        pack_sequences: several rows per sequence.
        learn_from: labels on `all` answers of a conversation, or on the `last` one only.
        video: how videos are sampled; None for the defaults of `VideoSampling`.
        max_positions: longest sequence that the model takes; without `max_length`, longer rows are bad.

    Raises:
        ValueError: the processor cannot be collated, or what it returns does not allow packing.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        pack: bool = False,
        *,
        pack_sequences: bool = False,
        learn_from: LearnFrom = "all",
        video: VideoSampling | None = None,
        max_positions: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {max_length}.")
        if pack and pack_sequences:
            raise ValueError("pack and pack_sequences exclude each other; set one of them.")
        if pack_sequences and max_length is None:
            raise ValueError("pack_sequences fills sequences up to max_length; set max_length.")
        self.encoder = ChatEncoder(processor, learn_from, video)
        reason = why_not_packed(self.encoder) if pack or pack_sequences else None
        if reason is not None:
            raise ValueError(f"{'pack' if pack else 'pack_sequences'} is not exact here: {reason}; set it to false.")
        self.max_length = max_length
        self.max_positions = max_positions
        self.pack = pack
        self.pack_sequences = pack_sequences
        self.packs = pack or pack_sequences
        self.pad_id = self.encoder.pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Collate rows.

        Raises:
            BadRow: a row is broken (`GoodRows` replaces such rows instead).
        """
        return self.pad([(self.encode(row, index), []) for index, row in enumerate(rows)])

    def encode(self, row: dict[str, Any], index: int = 0) -> list[EncodedSequence]:
        """Encode one row to its sequences; `GoodRows` calls this, and `pad` makes batches of the results."""
        sequences, media = self.encoder.row(row, index), self.encoder.image_ids
        if self.pack:
            sequences = [packed(sequences, media, self.max_length)]
        else:
            sequences = [cut(sequence, media, self.max_length) for sequence in sequences]
        longest = max((max(sequence.positions) + 1 for sequence in sequences), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            raise BadRow(
                f"too long: {longest} tokens for the {self.max_positions} positions of the model; set max_length"
            )
        return set_content_ids(sequences)

    def pad(self, samples: list[tuple[list[EncodedSequence], list[tuple[str, BadRow]]]]) -> Batch:
        """Batch of encoded rows, each with the bad rows it stands in for."""
        sequences = [sequence for sample, _ in samples for sequence in sample]
        bad_rows = [bad for _, passed_over in samples for bad in passed_over]
        images = [sequence.images for sequence in sequences]
        if self.pack_sequences:
            assert self.max_length is not None
            groups = filled(sequences, self.max_length)
            images = [sequence.images for group in groups for sequence in group]
            sequences = [laid_out(group) for group in groups]
        return _batch(sequences, images, bad_rows, self.encoder, packed=self.packs)


class PromptCollator:
    """Turns rows into prompts for generation, padded on the left: one per conversation, without its last answer.

    A batch has everything that the processor returns for these prompts, and `meta` (`BatchMeta`) with the reference
    answers.

    Args:
        processor: processor with a fast tokenizer and a chat template (or a `suffix`, as PaliGemma's).
        video: how videos are sampled; None for the defaults of `VideoSampling`.
    """

    def __init__(self, processor: ProcessorMixin, *, video: VideoSampling | None = None) -> None:
        self.encoder = ChatEncoder(processor, video=video)
        self.pad_id = self.encoder.pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Collate rows.

        Raises:
            BadRow: a row is broken.
        """
        return self.pad([(self.encode(row, index), []) for index, row in enumerate(rows)])

    def encode(self, row: dict[str, Any], index: int = 0) -> list[EncodedSequence]:
        """Encode one row to its prompts; `GoodRows` calls this, and `pad` makes batches of the results."""
        return set_content_ids(self.encoder.row(row, index, prompt=True))

    def pad(self, samples: list[tuple[list[EncodedSequence], list[tuple[str, BadRow]]]]) -> Batch:
        """Batch of encoded rows, each with the bad rows it stands in for."""
        sequences = [sequence for sample, _ in samples for sequence in sample]
        bad_rows = [bad for _, passed_over in samples for bad in passed_over]
        images = [sequence.images for sequence in sequences]
        return _batch(sequences, images, bad_rows, self.encoder, prompts=True)


def _batch(
    sequences: list[EncodedSequence], images: list[dict[str, Tensor]], bad_rows: list[tuple[str, BadRow]],
    encoder: ChatEncoder, packed: bool = False, prompts: bool = False,
) -> Batch:  # fmt: skip
    """Pad and join sequences."""
    layout = encoder.layout
    batch: Batch = {"input_ids": _padded([s.input_ids for s in sequences], encoder.pad_id, prompts)}
    if not prompts:
        batch["labels"] = _padded([s.labels for s in sequences], IGNORED)
    segments = _padded([s.segments for s in sequences], -1, prompts)
    batch["attention_mask"] = packed_mask(segments) if packed else (segments >= 0).long()
    if packed:
        batch["position_ids"] = _padded([s.positions for s in sequences], 0)
    for name, fill in layout.tokens.items():
        batch[name] = _padded([s.tokens[name] for s in sequences], fill, prompts).to(layout.dtypes[name])
    batch |= layout.join(images)
    return batch | {"meta": _meta(sequences, segments, bad_rows)}


def _padded(lists: list[list[Any]], value: Any, left: bool = False) -> Tensor:
    width = max(len(items) for items in lists)
    padded = np.full((len(lists), width), value)
    for row, items in zip(padded, lists, strict=True):
        row[width - len(items) if left else 0 : width if left else len(items)] = items
    return torch.from_numpy(padded)


def _meta(sequences: list[EncodedSequence], segments: Tensor, bad_rows: list[tuple[str, BadRow]]) -> BatchMeta:
    return BatchMeta(
        families=[sequence.families for sequence in sequences],
        answers=[sequence.answers for sequence in sequences],
        rows=[sequence.row for sequence in sequences],
        segments=segments,
        num_conversations=sum(len(sequence.families) for sequence in sequences),
        ids=[sequence.content_id for sequence in sequences],
        num_answers=sum(len(labels) - labels.count(IGNORED) for labels in (s.labels[1:] for s in sequences)),
        dropped=sum(sequence.dropped for sequence in sequences),
        bad_rows=bad_rows,
    )
