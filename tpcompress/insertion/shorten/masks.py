"""Attention masks of shortened layers: made by transformers for the layer's own cache, or re-indexed if custom.

B samples, N columns, S columns of the language model's input, L keys in the layer's cache. A sliding window counts
retained columns: it is the window of the same decoder on the short sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    blockwise_overlay,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from tpcompress.families.base import Blocks
from tpcompress.insertion.shorten.columns import take_square
from tpcompress.insertion.shorten.sequence import Frame
from tpcompress.insertion.shorten.sizes import add_log_sizes

RECURRENT = ("conv", "linear_attention")
"""Kinds of layers with a state that runs over the columns, from which no column can be hidden."""


def layer_kind(config: Any, layer: int) -> str:
    """The kind of a decoder layer, in the words of transformers (`config.layer_types`)."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return str(kinds[layer])
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def layer_mask(
    config: Any,
    kind: str,
    hidden_BND: Tensor,
    padding_BL: Tensor | None,
    cache: Any,
    layer: int,
    blocks_BL: Tensor | None = None,
    blocks: Blocks | None = None,
    log_size_BN: Tensor | None = None,
) -> Any:
    """The mask of one pruned layer, in the form that its attention implementation takes.

    Args:
        config: the language model's config.
        kind: the layer's kind.
        hidden_BND: input of the layer; shape, dtype and device are read.
        padding_BL: True on real keys, old and new; None if all are real.
        cache: the request's cache, or None.
        layer: the layer whose cache is read.
        blocks_BL: int, ids of blocks that attend bidirectionally, -1 elsewhere; None without such blocks.
        blocks: the family's rule for them.
        log_size_BN: fp32, logarithm of the number of tokens that each of the first keys stands for, added to their
            attention logits; None if all stand for one. Layers with a state ignore it.

    Raises:
        ValueError: sizes with an attention implementation whose mask cannot carry them.
    """
    if log_size_BN is None or kind in RECURRENT:
        return _made(config, kind, hidden_BND, padding_BL, cache, layer, blocks_BL, blocks)
    mask = _made(config, kind, hidden_BND, padding_BL, cache, layer, blocks_BL, blocks, allow_is_causal_skip=False)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise ValueError(
            f"A pruner of this plan weighs attention by token sizes, which {config._attn_implementation} cannot: load "
            f"the model with attn_implementation='sdpa' or 'eager', or use a pruner without sizes."
        )
    forgotten = 0 if cache is None else cache.get_mask_sizes(hidden_BND.shape[1], layer)[1]
    return add_log_sizes(mask, log_size_BN[:, forgotten:], hidden_BND.dtype)


def _made(
    config: Any,
    kind: str,
    hidden_BND: Tensor,
    padding_BL: Tensor | None,
    cache: Any,
    layer: int,
    blocks_BL: Tensor | None,
    blocks: Blocks | None,
    **more: bool,
) -> Any:
    given: Any = {"position_ids": None, "layer_idx": layer, **more}
    if blocks is None or blocks_BL is None or kind not in blocks.kinds:
        make: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        return make(config, hidden_BND, padding_BL, cache, **given)
    if kind == "full_attention":
        return create_causal_mask(config, hidden_BND, padding_BL, cache, block_sequence_ids=blocks_BL, **given)
    if blocks.beyond_window:
        return create_sliding_window_causal_mask(
            config, hidden_BND, padding_BL, cache, block_sequence_ids=blocks_BL, **given
        )
    keys = blocks_BL.shape[1]
    if cache is not None:
        keys = sum(cache.get_mask_sizes(hidden_BND.shape[1], layer))
    padded_BL = F.pad(blocks_BL, (0, max(0, keys - blocks_BL.shape[1])), value=-1)
    return create_causal_mask(
        config, hidden_BND, padding_BL, cache, or_mask_function=blockwise_overlay(padded_BL),
        and_mask_function=sliding_window_overlay(config.sliding_window), **given,
    )  # fmt: skip


def custom_mask(mask_BHSS: Tensor, frame: Frame) -> Tensor:
    """Rows and columns of a caller's 4-D mask, in which fillers and hidden tokens attend to themselves only.

    Args:
        mask_BHSS: bool (True = may attend), or additive floats.
        frame: the columns to keep, counted from the language model's input.
    """
    mask_BHNN = take_square(mask_BHSS, frame.base_BN)
    if frame.present_BN is None:
        return mask_BHNN
    itself_NN = torch.eye(frame.width, dtype=torch.bool, device=mask_BHNN.device)
    open_BHNN = frame.present_BN[:, None, None] | itself_NN
    if mask_BHNN.dtype == torch.bool:
        return (mask_BHNN & open_BHNN) | (itself_NN & ~frame.present_BN[:, None, :, None])
    closed = torch.finfo(mask_BHNN.dtype).min
    mask_BHNN = mask_BHNN.masked_fill(~open_BHNN, closed)
    return mask_BHNN.masked_fill(itself_NN & ~frame.present_BN[:, None, :, None], 0.0)
