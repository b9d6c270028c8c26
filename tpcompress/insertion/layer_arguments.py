"""Attention mask, rotary embedding and position ids of a layer whose sequence or cache was shortened.

B samples, Q new columns, N columns at hand, S columns of the language model's input, L keys of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.attachment import Attachment
from tpcompress.insertion.call import Call
from tpcompress.insertion.conversation import StageCut, join
from tpcompress.insertion.gates import ARGUMENT
from tpcompress.insertion.shorten.columns import take
from tpcompress.insertion.shorten.masks import RECURRENT, custom_mask, layer_kind, layer_mask
from tpcompress.insertion.shorten.positions import rotary, take_rotary
from tpcompress.insertion.shorten.sizes import add_log_sizes, concat_log_sizes

LAYER_ROWS = {"per_layer_input": 1, "moe_mm_token_type_ids": 1}
"""Further arguments of a decoder layer with one entry per column, and the dimension of the columns."""

# ------------------------------------------------------------------------------------------------------- prefill


def update_in_prefill(
    attachment: Attachment, call: Call, index: int, hidden_BND: Tensor, kwargs: dict[str, Any]
) -> None:
    """Update the arguments of a layer in a prefill.

    After a stage before the language model only token sizes and gates are left to do: its mask and positions were
    already the language model's input.
    """
    frame = call.frame
    assert frame is not None
    if call.gates is not None:
        kwargs[ARGUMENT] = call.gates
    parts, kind = attachment.parts, layer_kind(attachment.parts.text_config, index)
    after_a_cut = any(cut.layer > 0 for cut in call.cuts) or (
        call.prefix is not None and call.prefix.at_layer(index) is not None
    )
    if not after_a_cut and (not call.has_sizes or kind in RECURRENT):
        return
    kwargs["attention_mask"] = call.once(
        ("mask", kind), lambda: _prefill_mask(attachment, call, index, kind, hidden_BND, kwargs)
    )
    if not after_a_cut:
        return
    kwargs["position_embeddings"] = call.once(
        ("rotary", kind), lambda: _prefill_rotary(attachment, call, index, kind, hidden_BND, kwargs)
    )
    for name, dim in LAYER_ROWS.items():
        if kwargs.get(name) is not None:
            kwargs[name] = take(kwargs[name], frame.base_BN, dim)
    # Flash attention reads gaps in the ids as packed sequences; most layers need the rotary embedding only.
    reads = parts.family.reads_positions(parts.model.config)
    kwargs["position_ids"] = _prefill_positions(attachment, call, index) if reads else None


def _prefill_positions(attachment: Attachment, call: Call, index: int) -> Tensor:
    """Position ids of the columns at hand."""

    def make() -> Tensor:
        frame, compact = call.frame, attachment.plan.positions == "compact" and call.layer_positions is not None
        assert frame is not None and call.positions is not None
        positions = call.layer_positions if compact else take(call.positions, frame.positioned_BN, -1)
        assert positions is not None
        if compact and call.prefix is not None:
            positions = positions - call.prefix.before(index, positions.device).num_dropped_B1
        return positions

    positions: Tensor = call.once("positions", make)
    return positions


def _prefill_rotary(
    attachment: Attachment, call: Call, index: int, kind: str, hidden_BND: Tensor, kwargs: Mapping[str, Any]
) -> Any:
    """Rotary embedding of the columns at hand: taken from the model's own, or made for compact positions."""
    assert call.frame is not None
    if attachment.plan.positions == "original" or call.layer_positions is None:
        return take_rotary(kwargs.get("position_embeddings"), call.frame.positioned_BN)
    return rotary(attachment.parts.language_model, hidden_BND, _prefill_positions(attachment, call, index), kind)


def _prefill_mask(
    attachment: Attachment, call: Call, index: int, kind: str, hidden_BND: Tensor, kwargs: Mapping[str, Any]
) -> Any:
    """Mask of a layer inside the language model."""
    frame = call.frame
    assert frame is not None
    if call.custom_mask is not None:
        mask_BHNN = custom_mask(call.custom_mask, frame)
        if frame.log_size_BN is None or kind in RECURRENT:
            return mask_BHNN
        return add_log_sizes(mask_BHNN, frame.log_size_BN, hidden_BND.dtype)
    plain = frame.present_BN is None and call.prefix is None and frame.log_size_BN is None
    if plain and kwargs.get("attention_mask") is None:
        return None  # nothing is padded or hidden: transformers would sync to inspect a mask of ones
    return made_mask(attachment, call, index, hidden_BND, kwargs.get("past_key_values"), index)


def made_mask(attachment: Attachment, call: Call, layer: int, hidden_BND: Tensor, cache: Any, cut_layer: int) -> Any:
    """Mask of a layer in a prefill, made for the columns that its cache holds and gets.

    Args:
        attachment: of the model.
        call: the prefill under way.
        layer: the layer.
        hidden_BND: its input; shape, dtype and device are read.
        cache: the request's cache, or None.
        cut_layer: layer whose cut determines what the cache holds; 0 for the language model's input.
    """
    parts, frame, blocks_BL = attachment.parts, call.frame, None
    assert frame is not None
    log_size_BL = frame.log_size_BN
    if call.blocks_BS is not None:
        blocks_BL = take(call.blocks_BS, frame.index_BN, 1)
        if frame.present_BN is not None:
            blocks_BL = blocks_BL.masked_fill(~frame.present_BN, -1)
    if call.prefix is not None:
        held = call.prefix.before(cut_layer, frame.index_BN.device)
        log_size_BL = concat_log_sizes(held.log_size_BN, held.width, log_size_BL, frame.width)
        if blocks_BL is not None:
            blocks_BL = torch.nn.functional.pad(blocks_BL, (held.width, 0), value=-1)
    config = parts.text_config
    return layer_mask(
        config, layer_kind(config, layer), hidden_BND, padding_of(call, cut_layer), cache,
        parts.family.keys_of(config, layer), blocks_BL, parts.family.blocks, log_size_BL,
    )  # fmt: skip


def padding_of(call: Call, cut_layer: int) -> Tensor | None:
    """2-D mask of the columns that a layer holds and gets in a prefill, bool (B, L); None if all are real."""
    assert call.frame is not None
    new_BN = call.frame.padding(call.mask_BS)
    if call.prefix is None:
        return new_BN
    held = call.prefix.before(cut_layer, call.frame.index_BN.device)
    return join(held.padding_BN, held.width, new_BN, call.frame.width)


# -------------------------------------------------------------------------------------------------------- decode


def update_in_decode(
    attachment: Attachment, call: Call, index: int, hidden_BQD: Tensor, kwargs: dict[str, Any]
) -> None:
    """Update the arguments of a layer in a call without images on a cache that was cut."""
    assert call.prefix is not None
    parts, inner = attachment.parts, call.prefix.at_layer(index)
    kind, cut = layer_kind(parts.text_config, index), inner or call.prefix.at_input()
    if cut is None or (inner is None and (cut.log_size_BN is None or kind in RECURRENT)):
        return
    if inner is not None and attachment.plan.positions == "compact":
        assert call.positions is not None
        sent = call.positions
        positions = call.once(("positions", cut.layer), lambda: sent - cut.num_dropped_B1)
        if parts.family.reads_positions(parts.model.config):
            kwargs["position_ids"] = positions
        kwargs["position_embeddings"] = call.once(
            ("rotary", kind, cut.layer), lambda: rotary(parts.language_model, hidden_BQD, positions, kind)
        )
    kwargs["attention_mask"] = call.once(
        ("mask", kind, cut.layer), lambda: _decode_mask(attachment, call, index, cut, hidden_BQD, kwargs)
    )


def _decode_mask(
    attachment: Attachment, call: Call, index: int, cut: StageCut, hidden_BQD: Tensor, kwargs: Mapping[str, Any]
) -> Any:
    """Mask of a layer for the columns that its cache holds and the new ones."""
    unmasked = kwargs.get("attention_mask") is None
    padding_BL = None if unmasked and cut.whole else cut.padding(call.new_BQ)
    if unmasked and padding_BL is None and cut.log_size_BN is None:
        return None
    parts, config = attachment.parts, attachment.parts.text_config
    return layer_mask(
        config, layer_kind(config, index), hidden_BQD, padding_BL, kwargs["past_key_values"],
        parts.family.keys_of(config, index), None, None, cut.log_size_BN,
    )  # fmt: skip
