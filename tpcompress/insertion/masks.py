"""Attention masks of shortened layers: made by transformers for the layer's own cache, or re-indexed if custom.

B samples, N columns, S columns of the language model's input, L keys in the layer's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from tpcompress.insertion.sequence import Frame, take_square


def layer_mask(
    config: Any,
    hidden_BND: Tensor,
    padding_BL: Tensor | None,
    cache: Any,
    layer: int,
    base_mask: Any,
) -> Any:
    """The causal mask of one pruned layer, in whatever form its attention implementation takes.

    Args:
        config: the language model's config.
        hidden_BND: input of the layer; shape, dtype and device are read.
        padding_BL: True on real keys, old and new; None if all are.
        cache: the request's cache, or None.
        layer: index of the layer, whose own cache length counts.
        base_mask: what the language model made for its own input. None means that nothing is padded and the
            kernel's own causal flag serves; the same then holds here.
    """
    if base_mask is None and padding_BL is None:
        return None
    return create_causal_mask(config, hidden_BND, padding_BL, cache, position_ids=None, layer_idx=layer)


def custom_mask(mask_BHSS: Tensor, frame: Frame) -> Tensor:
    """Rows and columns of a caller's 4-D mask; fillers and hidden tokens see themselves and are seen by nobody.

    Args:
        mask_BHSS: bool (True = may look), or additive floats.
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
