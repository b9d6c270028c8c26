"""Counts and positions of an item's placeholders before and after pruning, from the size of the image alone.

R budget rows of an item, P placeholders of an item before pruning, T tokens of a prompt after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompress.families import Layout
from tpcompress.insertion.plan import PruningPlan
from tpcompress.serving.vllm.adapter import Adapter, Fields

BASE = 256
"""Offsets are stored as two digits, because bfloat16 holds whole numbers exactly up to 256 only."""
CHANNELS = 6
"""Columns that hold an offset on three axes."""


@dataclass(frozen=True)
class ItemRow:
    """One budget row of an image or video.

    Attributes:
        placeholders: vision tokens and separators before pruning.
        kept: of these, after pruning.
        span: positions that the row takes before pruning.
    """

    placeholders: int
    kept: int
    span: int


def item_rows(
    plan: PruningPlan, adapter: Adapter, config: Any, modality: str, fields: Fields, total: int
) -> list[ItemRow]:
    """The budget rows of one image or video, in the order of the sequence.

    Args:
        plan: whose first stage acts before the language model.
        adapter: of the model type.
        config: of the model.
        modality: `image` or `video`.
        fields: processor outputs of the item, see `Adapter.fields`.
        total: its placeholders before pruning.

    Raises:
        ValueError: the layouts do not have that many placeholders, so that vLLM counts otherwise than transformers.
    """
    layouts = item_layouts(plan, adapter, config, modality, fields, total)
    positions = None if adapter.positions is None else adapter.positions(config, modality, fields)
    rows, first = [], 0
    for layout in layouts:
        last = first + layout.placeholders
        span = layout.placeholders if positions is None else int(positions[:, first:last].max()) + 1
        kept = plan.stages[0].budget.count(layout.count) + layout.placeholders - layout.count
        rows.append(ItemRow(layout.placeholders, kept, span))
        first = last
    return rows


def item_layouts(
    plan: PruningPlan, adapter: Adapter, config: Any, modality: str, fields: Fields, total: int
) -> list[Layout]:
    """One layout per budget row of an image or video.

    Raises:
        ValueError: see `item_rows`.
    """
    layouts = adapter.layouts(config, modality, fields, total)
    counted = sum(layout.placeholders for layout in layouts)
    if counted != total:
        raise ValueError(
            f"vLLM counts {total} tokens for this {modality}, its layout has {counted}; serve it with transformers."
        )
    if plan.scope == "tile" and adapter.positions is None:
        return [piece for layout in layouts for piece in layout.pieces]
    return layouts


def shortened(tokens: Sequence[int], embeds: Sequence[bool], rows: Sequence[ItemRow]) -> list[int]:
    """The tokens that replace an item in the prompt, with as many placeholders as are retained.

    Args:
        tokens: the replacement before pruning.
        embeds: which of its tokens are placeholders.
        rows: the item's budget rows; text may stand between them, not within one.
    """
    kept = [place < row.kept for row in rows for place in range(row.placeholders)]
    left = iter(kept)
    return [token for token, embed in zip(tokens, embeds, strict=True) if not embed or next(left)]


def row_offsets(index_N: Tensor, rows: Sequence[ItemRow], positions_3P: Tensor | None) -> Tensor:
    """Positions of retained placeholders relative to the start of their row, as digits (N, CHANNELS).

    Args:
        index_N: their indices among the placeholders of the item.
        rows: its budget rows.
        positions_3P: positions of all placeholders on three axes; None with one position per token.
    """
    if positions_3P is None:
        starts = [start for row, start in zip(rows, _starts(rows), strict=True) for _ in range(row.placeholders)]
        place_P = torch.arange(len(starts)) - torch.tensor(starts)
        positions_3P = place_P.expand(3, -1)
    offset_3N = positions_3P.to(index_N.device)[:, index_N]
    return torch.cat([offset_3N // BASE, offset_3N % BASE]).T


def read_offsets(digits_NC: Tensor) -> Tensor:
    """The offsets that `row_offsets` wrote, int64 (3, N)."""
    digits_CN = digits_NC.T.long()
    return digits_CN[:3] * BASE + digits_CN[3:]


def prompt_positions(length: int, items: Sequence[tuple[int, Sequence[bool], Sequence[ItemRow]]]) -> tuple[Tensor, int]:
    """Positions of a shortened prompt: text as in the unpruned prompt, placeholders at the start of their row.

    Args:
        length: T, tokens of the shortened prompt.
        items: start, placeholder mask and budget rows of each image or video, in the order of the prompt.

    Returns:
        Positions (3, T), and what is added to the index of a later token to get its position.
    """
    position_T = torch.arange(length)
    for start, embeds, rows in items:
        left = [row for row in rows for _ in range(row.kept)]
        seen = 0
        column, base = start, 0
        for embed in embeds:
            if embed:
                row = left[seen]
                first = seen == 0 or left[seen - 1] is not row
                base = int(position_T[column]) if first else base
                position_T[column] = base
                seen += 1
                if seen == len(left) or left[seen] is not row:
                    position_T[column + 1 :] = torch.arange(length - column - 1) + base + row.span
            column += 1
    delta = int(position_T[-1]) + 1 - length if length else 0
    return position_T.expand(3, -1).clone(), delta


def _starts(rows: Sequence[ItemRow]) -> list[int]:
    starts, first = [], 0
    for row in rows:
        starts.append(first)
        first += row.placeholders
    return starts
