"""Counts and positions of an item's placeholders before and after pruning, from the size of the image alone.

R rows of an item (runs of placeholders without text between them), P placeholders of an item before pruning, L tokens
of an item and T of a prompt after it, N retained placeholders.
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
    """One run of placeholders of an image or video, without text between them.

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
    """The rows of one image or video, in the order of the sequence.

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
    layouts = item_layouts(adapter, config, modality, fields, total)
    positions = None if adapter.positions is None else adapter.positions(config, modality, fields)
    budget = plan.stages[0].budget
    rows, first = [], 0
    for layout in layouts:
        last = first + layout.placeholders
        span = layout.placeholders if positions is None else int(positions[:, first:last].max()) + 1
        parts = layout.pieces if plan.scope == "tile" else (layout,)
        kept = sum(budget.count(part.count) for part in parts) + layout.placeholders - layout.count
        rows.append(ItemRow(layout.placeholders, kept, span))
        first = last
    return rows


def item_layouts(adapter: Adapter, config: Any, modality: str, fields: Fields, total: int) -> list[Layout]:
    """The layouts of one image or video, one per run of placeholders without text between them.

    Raises:
        ValueError: see `item_rows`.
    """
    layouts = adapter.layouts(config, modality, fields, total)
    counted = sum(layout.placeholders for layout in layouts)
    if counted != total:
        raise ValueError(
            f"vLLM counts {total} tokens for this {modality}, its layout has {counted}; serve it with transformers."
        )
    return layouts


def shortened(tokens: Sequence[int], embeds: Sequence[bool], rows: Sequence[ItemRow]) -> list[int]:
    """The tokens that replace an item in the prompt, with as many placeholders as are retained.

    Args:
        tokens: the replacement before pruning.
        embeds: which of its tokens are placeholders.
        rows: of the item; text may stand between them, not within one.
    """
    kept = [place < row.kept for row in rows for place in range(row.placeholders)]
    left = iter(kept)
    return [token for token, embed in zip(tokens, embeds, strict=True) if not embed or next(left)]


def row_offsets(index_N: Tensor, rows: Sequence[ItemRow], positions_3P: Tensor | None) -> Tensor:
    """Positions of retained placeholders relative to the start of their row, as digits (N, CHANNELS).

    Args:
        index_N: their indices among the placeholders of the item.
        rows: of the item.
        positions_3P: positions of all placeholders on three axes; None with one position per token.
    """
    if positions_3P is None:
        length_R = torch.tensor([row.placeholders for row in rows])
        start_P = (length_R.cumsum(0) - length_R).repeat_interleave(length_R)
        positions_3P = (torch.arange(len(start_P)) - start_P).expand(3, -1)
    offset_3N = positions_3P.to(index_N.device)[:, index_N]
    return torch.cat([offset_3N // BASE, offset_3N % BASE]).T


def read_offsets(digits_NC: Tensor) -> Tensor:
    """The offsets that `row_offsets` wrote, int64 (3, N)."""
    digits_CN = digits_NC.T.long()
    return digits_CN[:3] * BASE + digits_CN[3:]


def prompt_positions(length: int, items: Sequence[tuple[int, Tensor, Sequence[ItemRow]]]) -> tuple[Tensor, int]:
    """Positions of a shortened prompt: text as in the unpruned prompt, placeholders at the start of their row.

    Args:
        length: T, tokens of the shortened prompt.
        items: start, placeholder mask (bool, (L,)) and rows of each image or video, in the order of the prompt.

    Returns:
        Positions (3, T), and what is added to the index of a later token to get its position.
    """
    step_T = torch.ones(length, dtype=torch.int64)  # from the position of a token to that of the next
    for start, embed_L, rows in items:
        column_N = start + embed_L.nonzero()[:, 0]
        step_T[column_N] = 0
        last_R = torch.tensor([row.kept for row in rows]).cumsum(0) - 1
        step_T[column_N[last_R]] = torch.tensor([row.span for row in rows])
    end_T = step_T.cumsum(0)
    return (end_T - step_T).expand(3, -1).clone(), int(step_T.sum()) - length
