"""Position ids and rotary embeddings of a shortened sequence.

B samples, S columns of the language model's input, N columns that are left, A = 3 rows of M-RoPE position ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.shorten.columns import take
from tpcompress.insertion.signatures import parameters_of


def closed_up(positions_ABS: Tensor, real_BS: Tensor | None, alive_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Compact M-RoPE positions: without the values that no retained token uses.

    An image spans max(rows, columns) positions and not one per token, so dropping tokens frees a value only if no
    retained token has it on any of the three axes. Text stays equal on all axes, the order stays, and values that the
    unpruned model skips (time between the frames of a video) stay skipped.

    Args:
        positions_ABS: int (3, B, S).
        real_BS: False on padding, whose positions are ignored; None without padding.
        alive_BS: True on retained columns.

    Returns:
        New positions (3, B, S), and the number of values that each sample lost (B, 1).
    """
    A, B, S = positions_ABS.shape
    value_BM = positions_ABS.transpose(0, 1).reshape(B, A * S)
    if real_BS is not None:
        alive_BS = alive_BS & real_BS
    alive_BM = alive_BS.repeat(1, A)
    used_BM = torch.ones_like(alive_BM) if real_BS is None else real_BS.bool().repeat(1, A)
    order_BM = value_BM.argsort(dim=1, stable=True)
    sorted_BM = value_BM.gather(1, order_BM)
    first_BM = torch.ones_like(alive_BM)
    first_BM[:, 1:] = sorted_BM[:, 1:] != sorted_BM[:, :-1]
    group_BM = first_BM.cumsum(1) - 1
    zero_BM = torch.zeros_like(group_BM)
    alive_BG = zero_BM.scatter_reduce(1, group_BM, alive_BM.gather(1, order_BM).long(), "amax")
    used_BG = zero_BM.scatter_reduce(1, group_BM, used_BM.gather(1, order_BM).long(), "amax")
    freed_BG = used_BG * (1 - alive_BG)
    shift_BM = torch.zeros_like(value_BM).scatter(1, order_BM, (freed_BG.cumsum(1) - freed_BG).gather(1, group_BM))
    moved_BM = value_BM - shift_BM
    return moved_BM.view(B, A, S).transpose(0, 1), freed_BG.sum(1, keepdim=True)


ROTARY = ("rotary_emb", "pos_emb")
"""Attributes under which text models have their rotary embedding."""


def rotary(language_model: Any, hidden: Tensor, positions: Tensor, kind: str) -> Any:
    """The rotary embedding of a language model at given position ids, for layers of one kind.

    Args:
        language_model: the text model.
        hidden: tensor with dtype and device of the result.
        positions: int (B, N); with M-RoPE (3, B, N), or (4, B, N) with text positions first.
        kind: the kind of layer, for models whose kinds have different embeddings.
    """
    if positions.ndim == 3 and len(positions) == 4:
        positions = positions[1:]
    embed = next(getattr(language_model, name) for name in ROTARY if hasattr(language_model, name))
    more = (kind,) if "layer_type" in parameters_of(type(embed).forward) else ()
    return embed(hidden, positions, *more)


def take_rotary(source: Any, index_BN: Tensor) -> Any:
    """Columns of a rotary embedding: a tensor (B, S, d), a tuple of tensors, or None in a layer without positions."""
    if source is None:
        return None
    return take(source, index_BN, -2) if isinstance(source, Tensor) else tuple(take(x, index_BN, -2) for x in source)


def packed(positions: Tensor | None) -> bool:
    """Whether transformers would read position ids as packed sequences; with M-RoPE it reads the text row, if any."""
    if positions is not None and positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]
    return positions is not None and positions.ndim == 2 and bool((positions.diff(dim=-1) != 1).any())
