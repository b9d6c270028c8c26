"""Calls with images: locates their vision tokens, runs the stages, and shortens what the language model gets.

B samples, S columns of the call, N columns after some stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpcompress.families import Parts
from tpcompress.insertion.attachment import Attachment, Request
from tpcompress.insertion.cache import held_columns
from tpcompress.insertion.call import Call, last_prompt_token, num_steps
from tpcompress.insertion.conversation import CachedPrefix, StageCut
from tpcompress.insertion.decode import check_cuts, known_prefix, new_columns
from tpcompress.insertion.encoded import given_features
from tpcompress.insertion.layer_arguments import made_mask, padding_of, update_in_prefill
from tpcompress.insertion.layer_probe import LayerProbe
from tpcompress.insertion.shorten.columns import take, to_device_async
from tpcompress.insertion.shorten.locate import locate
from tpcompress.insertion.shorten.masks import custom_mask, layer_kind
from tpcompress.insertion.shorten.positions import closed_up, packed
from tpcompress.insertion.shorten.sequence import Frame
from tpcompress.insertion.stage import run_stage

INPUT_ROWS = {"per_layer_inputs": 1, "moe_mm_token_type_ids": 1}
"""Further arguments of a language model with one entry per column, and the dimension of the columns."""


def begin(attachment: Attachment, request: Request, kwargs: Mapping[str, Any]) -> Call:
    """The state of a call with these arguments of the core model.

    Raises:
        ValueError: arguments that do not go together with pruning, or features whose layout is unknown.
    """
    parts = attachment.parts
    mask, cache, steps = kwargs.get("attention_mask"), kwargs.get("past_key_values"), num_steps(kwargs)
    prefix = _conversation(attachment, kwargs, cache, steps)
    mask_BS = mask[:, -steps:] if isinstance(mask, Tensor) and mask.ndim == 2 else None
    custom = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
    if kwargs.get("output_router_logits"):
        raise ValueError(
            "output_router_logits requests the load balancing loss, which requires that every layer gets the same "
            "tokens; leave it off while a plan is attached."
        )
    if mask is None and cache is None and packed(kwargs.get("position_ids")):
        raise ValueError(
            "position_ids without an attention_mask are read as packed sequences, which cannot be pruned; pass an "
            "attention_mask (all ones if nothing is padded, or 4-D if sequences are packed)."
        )
    if custom is not None and prefix is not None:
        raise ValueError(
            "A 4-D attention_mask cannot be combined with a cache that already holds tokens when images are pruned; "
            "pass a 2-D mask of the whole conversation."
        )
    if custom is not None and attachment.plan.positions == "compact" and parts.family.positions == "mrope":
        raise ValueError(
            "A 4-D attention_mask (packed sequences) cannot be combined with compact positions of M-RoPE; use "
            "positions: original, or a 2-D mask."
        )
    return Call(
        settings=attachment.settings,
        labels_BS=request.labels_BS,
        mask_BS=mask_BS,
        places=placeholders(parts, kwargs),
        tokens=tokens_of_tiles(parts, kwargs),
        encoded=given_features(kwargs),
        blocks_BS=_blocks(attachment, kwargs, prefix, steps),
        prefix=prefix,
        custom_mask=custom,
    )


def _conversation(attachment: Attachment, kwargs: Mapping[str, Any], cache: Any, steps: int) -> CachedPrefix | None:
    """The conversation in the cache before this call; None if the cache is empty."""
    if cache is None or int(held_columns(cache)) == 0:
        return None
    earlier = known_prefix(cache, steps)
    if earlier is None or not earlier.cuts:
        mask = kwargs.get("attention_mask")
        length = int(held_columns(cache))
        mask_BP = mask[:, :length] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return CachedPrefix(length, mask_BP=mask_BP)
    check_cuts(attachment.settings.placement, earlier)
    new, new_BQ = new_columns(kwargs, earlier, steps)
    return earlier.grown(new - steps, None if new_BQ is None else new_BQ[:, : new - steps])


def placeholders(parts: Parts, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """By modality, where placeholders stand: bool (B, S)."""
    ids = kwargs.get("input_ids")
    if ids is not None:
        return {modality: ids == number for modality, number in parts.placeholder_ids.items()}
    embedding: Any = parts.model.get_input_embeddings()
    embeds, found = kwargs["inputs_embeds"], {}
    for modality, number in parts.placeholder_ids.items():
        # Through the module and not its weight: some embeddings scale their output.
        row = embedding(torch.full((1, 1), number, device=embeds.device))
        found[modality] = (embeds == row.to(embeds.dtype)).all(-1)
    return found


def tokens_of_tiles(parts: Parts, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Ids or embeddings of a call, if they tell which tiles are of one image."""
    if parts.family.tiles is None or not parts.family.tiles.closes:
        return None
    ids = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if ids is None else ids


def _blocks(
    attachment: Attachment, kwargs: Mapping[str, Any], prefix: CachedPrefix | None, steps: int
) -> Tensor | None:
    """Block ids of the call's columns that attend bidirectionally; in a conversation, of its last columns."""
    blocks = attachment.parts.family.blocks
    ids_BP = None if blocks is None else blocks.ids(attachment.parts.model.config, kwargs)
    if ids_BP is None:
        return None
    # As in transformers: columns beyond the caller's ids (candidates of assisted decoding) are in no block.
    length = steps if prefix is None else prefix.length + steps
    return torch.nn.functional.pad(ids_BP, (0, max(0, length - ids_BP.shape[1])), value=-1)[:, -steps:]


def enter(attachment: Attachment, call: Call, kwargs: dict[str, Any], num_candidates: int) -> bool:
    """Run the stage before the language model and update its arguments.

    Args:
        attachment: of the model.
        call: the prefill under way.
        kwargs: arguments of the language model.
        num_candidates: tokens at the end of the prompt that are candidates of assisted decoding.

    Returns:
        False if the call brought no vision token after all.
    """
    if not any(layout.count for encoded in call.encoded.values() for layout in encoded.layouts):
        return False
    parts, plan = attachment.parts, attachment.plan
    hidden_BSD: Tensor = kwargs["inputs_embeds"]
    B, S, _ = hidden_BSD.shape
    device = hidden_BSD.device
    layouts = {modality: encoded.layouts for modality, encoded in call.encoded.items()}
    call.rows = locate(call.places, layouts, plan.scope, parts.family.tiles, parts.family.splits_tiles, call.tokens)
    call.frame = Frame.full(B, S, device, call.mask_BS)
    call.last_vision = call.rows.index_RV.max() if B == 1 else None  # padding repeats a row's last token
    call.last_prompt_B = last_prompt_token(call.labels_BS, call.mask_BS, B, S, device)
    if call.labels_BS is None:
        call.last_prompt_B = (call.last_prompt_B - num_candidates).clamp(min=0)
    call.positions, call.real_BN = kwargs.get("position_ids"), call.mask_BS
    if call.positions is None:
        past = 0 if call.prefix is None else call.prefix.length
        call.positions = (torch.arange(S, device=device) + past)[None]
    earlier = None if call.prefix is None else call.prefix.at_input()
    if 0 in call.settings.placement.stage_at:
        kwargs["inputs_embeds"], local_BN, changed = run_stage(attachment, 0, hidden_BSD, call)
        if changed or earlier is not None:
            positions, num_dropped_B1 = retained_positions(call, plan.positions)
            leave_cut(call, 0, num_dropped_B1)
            if plan.positions == "compact" and earlier is not None:
                positions = positions - earlier.num_dropped_B1
            for name, dim in INPUT_ROWS.items():
                if local_BN is not None and kwargs.get(name) is not None:
                    kwargs[name] = take(kwargs[name], local_BN, dim)
            kwargs["position_ids"] = call.positions = positions
            kwargs["attention_mask"] = _input_mask(attachment, call, kwargs)
            if call.custom_mask is not None:
                call.custom_mask = kwargs["attention_mask"]
    call.real_BN = call.frame.padding(call.mask_BS)
    call.frame = call.frame.as_input()
    if any("input" in stage.pruner.needs for stage in plan.stages):
        call.entry = (call.rows, call.frame, kwargs["inputs_embeds"])
    if "logits_to_keep" in kwargs:
        # Gemma 4 shortens its last layers by it; the output head applies it in any case.
        kwargs["logits_to_keep"] = 0
    return True


def _input_mask(attachment: Attachment, call: Call, kwargs: Mapping[str, Any]) -> Any:
    """The language model's mask after a stage before it, in the form in which it came."""
    assert call.frame is not None
    parts, mask = attachment.parts, kwargs.get("attention_mask")
    if call.custom_mask is not None:
        return custom_mask(call.custom_mask, call.frame)
    if isinstance(mask, dict) or (parts.family.masks_in_core and mask is not None):
        kinds = [layer_kind(parts.text_config, layer) for layer in range(len(parts.layers))]
        hidden_BND, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        made = {
            kind: made_mask(attachment, call, kinds.index(kind), hidden_BND, cache, 0) for kind in dict.fromkeys(kinds)
        }
        return made if isinstance(mask, dict) else made[kinds[0]]
    padding_BN = padding_of(call, 0)
    if padding_BN is not None:
        return padding_BN
    # Never None: position ids with gaps would be read as packed sequences.
    width = call.frame.width + (0 if call.prefix is None else call.prefix.before(0, call.frame.index_BN.device).width)
    return torch.ones(len(call.frame.index_BN), width, dtype=torch.bool, device=call.frame.index_BN.device)


def leave_cut(call: Call, layer: int, num_dropped_B1: Tensor) -> None:
    """Keep for later calls what a stage did."""
    assert call.frame is not None
    call.cuts.append(StageCut.of(layer, call.frame, call.frame.padding(call.mask_BS), num_dropped_B1))


def shorten_layer(
    attachment: Attachment, call: Call, index: int, layer: Any, hidden_BND: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Run the stage before a layer, if there is one, and update the layer's arguments.

    Returns:
        The layer's hidden states.
    """
    placement = call.settings.placement
    earlier = None if call.prefix is None else call.prefix.at_layer(index)
    if index in placement.looks_ahead:
        uncut = dict(kwargs)
        update_in_prefill(attachment, call, index, hidden_BND, uncut)
        call.ahead = LayerProbe(layer, index, hidden_BND, uncut)
    if index in placement.stage_at and index > 0:
        hidden_BND, _, changed = run_stage(attachment, placement.stage_at[index], hidden_BND, call)
        if changed or (earlier is not None and earlier.layer == index):
            call.memo.clear()
            call.layer_positions, num_dropped_B1 = retained_positions(call, attachment.plan.positions)
            leave_cut(call, index, num_dropped_B1)
    update_in_prefill(attachment, call, index, hidden_BND, kwargs)
    return hidden_BND


def retained_positions(call: Call, policy: str) -> tuple[Tensor, Tensor]:
    """Position ids of the columns at hand, and the positions that each sample lost since the input (B, 1).

    Args:
        call: the prefill under way.
        policy: `original` or `compact`; positions that tokens took over (`place_BN`) count under the first only.
    """
    frame, positions = call.frame, call.positions
    assert frame is not None and positions is not None
    num_dropped_B1 = to_device_async(torch.tensor(frame.lost), frame.index_BN.device)[:, None]
    if policy == "original":
        return take(positions, frame.positioned_BN, -1), num_dropped_B1
    if positions.ndim < 3:
        return take(positions, frame.base_BN, -1) - frame.shift_BN, num_dropped_B1
    B, N0 = len(frame.index_BN), positions.shape[-1]
    alive_BN = torch.zeros(B, N0, dtype=torch.bool, device=positions.device)
    present_BN = torch.ones_like(frame.base_BN, dtype=torch.bool) if frame.present_BN is None else frame.present_BN
    alive_BN = alive_BN.scatter(1, frame.base_BN, present_BN)
    text, axes = positions[: len(positions) - 3], positions[-3:].expand(3, B, N0)
    closed, num_dropped_B1 = closed_up(axes, call.real_BN, alive_BN)
    return torch.cat([take(text, frame.base_BN, -1), take(closed, frame.base_BN, -1)]), num_dropped_B1
