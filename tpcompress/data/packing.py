"""Several conversations in one sequence, and the truncation of those that are too long.

Shapes: B sequences in the batch, S tokens in the longest sequence.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64

from tpcompress.data.encode import IGNORED, ChatEncoder, EncodedSequence, common_prefix
from tpcompress.data.rows import BadRow


def why_not_packed(encoder: ChatEncoder) -> str | None:
    """Why packed conversations would not equal separate ones, as far as the processor tells; None if they do.

    A model builds multimodal positions and bidirectional blocks itself from inputs per token, for one conversation.
    """
    lost = encoder.layout.structured
    if not lost:
        return None
    return f"{encoder.name} returns {', '.join(lost)}, by which the model makes its own positions or attention"


def why_config_not_packed(config: Any) -> str | None:
    """Why packed conversations would not equal separate ones, as far as the config of a model tells; None if they do.

    A mask of one's own replaces sliding windows and chunks, and layers with a state read across conversations.

    Args:
        config: config of the model (`PretrainedConfig`).
    """
    text = config.get_text_config()
    kinds = sorted({*(getattr(text, "layer_types", None) or [])} - {"full_attention"})
    if kinds:
        return f"the language model has layers of type {', '.join(kinds)}"
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True):
        return f"the language model has a sliding window of {window} tokens"
    return None


def filled(sequences: list[EncodedSequence], max_length: int) -> list[list[EncodedSequence]]:
    """Group sequences so that those of a group fit into `max_length` tokens together (first fit).

    Args:
        sequences: sequences of at most `max_length` tokens.
        max_length: tokens of a group.
    """
    groups: list[list[EncodedSequence]] = []
    room: list[int] = []
    for sequence in sequences:
        length = len(sequence.input_ids)
        fits = next((number for number, left in enumerate(room) if left >= length), None)
        if fits is None:
            groups.append([])
            room.append(max_length)
            fits = len(groups) - 1
        groups[fits].append(sequence)
        room[fits] -= length
    return groups


def laid_out(group: list[EncodedSequence]) -> EncodedSequence:
    """One sequence of several, one segment after the other; its images are those of the group, in their order.

    Its content id depends on the group, so that it is not found in a cache of other batches.
    """
    joined = EncodedSequence([], [], [], [], [], [], row=group[0].row, tokens={name: [] for name in group[0].tokens})
    for number, sequence in enumerate(group, start=1):
        start = len(joined.labels)
        _append(joined, sequence, 0, number)
        joined.labels[start] = IGNORED  # its predecessor belongs to another conversation
        joined.dropped += sequence.dropped
    ids = "".join(sequence.content_id for sequence in group)
    joined.content_id = xxh3_64(ids.encode()).hexdigest() if len(group) > 1 else ids
    return joined


def packed(conversations: list[EncodedSequence], media_ids: Collection[int], max_length: int | None) -> EncodedSequence:
    """Pack the conversations of a row into one sequence: the common prefix, then the remainder of each.

    Args:
        conversations: sequences that share their images.
        media_ids: token ids of placeholders.
        max_length: maximum length; conversations that do not fit are dropped.

    Raises:
        BadRow: not one conversation fits, or they differ before their images end.
    """
    first_target = min(_first_target(c.labels) for c in conversations)
    # Each remainder starts with an unlabelled token, because its predecessor belongs to another conversation.
    prefix = min(common_prefix([c.input_ids for c in conversations]), first_target - 1)
    first = conversations[0]
    if max(_media_end(c.input_ids, media_ids) for c in conversations) > prefix:
        raise BadRow("conversations differ before their images end; put the images first, or set pack to false")
    ids, labels, positions = first.input_ids[:prefix], first.labels[:prefix], first.positions[:prefix]
    tokens = {name: numbers[:prefix] for name, numbers in first.tokens.items()}
    joined = EncodedSequence(ids, labels, [0] * prefix, positions, [], [], first.images, first.row, tokens=tokens)
    for number, conversation in enumerate(conversations, start=1):
        rest = len(conversation.input_ids) - prefix
        if max_length is not None and len(joined.input_ids) + rest > max_length:
            joined.dropped = len(conversations) - number + 1
            break
        _append(joined, conversation, prefix, number)
    if not joined.families:
        raise BadRow(f"too long: one conversation needs {prefix + rest} tokens; raise max_length ({max_length})")
    return joined


def cut(sequence: EncodedSequence, media_ids: Collection[int], max_length: int | None) -> EncodedSequence:
    """Truncate a sequence, never inside its images or before its first answer token.

    Args:
        sequence: the sequence, which is changed.
        media_ids: token ids of placeholders.
        max_length: maximum length.

    Raises:
        BadRow: its images and the first answer token do not fit.
    """
    length = len(sequence.input_ids)
    if max_length is None or length <= max_length:
        return sequence
    needed = max(_media_end(sequence.input_ids, media_ids), _first_target(sequence.labels) + 1)
    if needed > max_length:
        raise BadRow(f"too long: images and first answer token need {needed} tokens; raise max_length ({max_length})")
    for name in ("input_ids", "labels", "segments", "positions"):
        setattr(sequence, name, getattr(sequence, name)[:max_length])
    sequence.tokens = {name: numbers[:max_length] for name, numbers in sequence.tokens.items()}
    sequence.dropped = 1
    return sequence


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


def _append(joined: EncodedSequence, conversation: EncodedSequence, start: int, number: int) -> None:
    """Append a conversation from `start` on as segment `number`."""
    for name in ("input_ids", "labels", "positions"):
        getattr(joined, name).extend(getattr(conversation, name)[start:])
    for name, numbers in conversation.tokens.items():
        joined.tokens[name].extend(numbers[start:])
    joined.segments += [number] * (len(conversation.input_ids) - start)
    joined.families += conversation.families
    joined.answers += conversation.answers


def _media_end(ids: list[int], media_ids: Collection[int]) -> int:
    """Index after the last placeholder; 0 without images."""
    return max((index + 1 for index, token in enumerate(ids) if token in media_ids), default=0)


def _first_target(labels: list[int]) -> int:
    return next(index for index, label in enumerate(labels) if label != IGNORED)
