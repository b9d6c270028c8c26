"""A call that brings images: what stages see, and what the language model and its layers get after them.

B samples, S columns of the call, N columns after some stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpcompress.insertion.cache import held_columns
from tpcompress.insertion.call import Call, Cut, Prefix, join, last_prompt_token, num_steps
from tpcompress.insertion.decode import check_places, known_prefix, new_columns
from tpcompress.insertion.encode import given_notes
from tpcompress.insertion.gates import ARGUMENT
from tpcompress.insertion.layer_probe import LayerInput
from tpcompress.insertion.shorten.columns import take
from tpcompress.insertion.shorten.locate import locate
from tpcompress.insertion.shorten.masks import RECURRENT, custom_mask, layer_kind, layer_mask
from tpcompress.insertion.shorten.positions import packed, retained_positions, rotary, take_rotary
from tpcompress.insertion.shorten.sequence import Frame
from tpcompress.insertion.shorten.sizes import joined, weighed
from tpcompress.insertion.stage import run_stage

if TYPE_CHECKING:
    from tpcompress.insertion.hooks import Controller

INPUT_ROWS = {"per_layer_inputs": 1, "moe_mm_token_type_ids": 1}
"""Further arguments of a language model with one entry per column, and the dimension of the columns."""
LAYER_ROWS = {"per_layer_input": 1, "moe_mm_token_type_ids": 1}
"""The same for decoder layers."""


def begin(controller: Controller, kwargs: Mapping[str, Any]) -> Call:
    """Note what the outer model was called with."""
    parts = controller.parts
    mask, cache, steps = kwargs.get("attention_mask"), kwargs.get("past_key_values"), num_steps(kwargs)
    prefix = _conversation(controller, kwargs, cache, steps)
    mask_BS = mask[:, -steps:] if isinstance(mask, Tensor) and mask.ndim == 2 else None
    custom = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
    if kwargs.get("output_router_logits"):
        raise ValueError(
            "output_router_logits asks for the load balancing loss, which wants every layer to see the same tokens; "
            "leave it off while a plan is attached."
        )
    if mask is None and cache is None and packed(kwargs.get("position_ids")):
        raise ValueError(
            "position_ids without an attention_mask are read as packed sequences, which a pruned sequence cannot "
            "be; pass an attention_mask (all ones if nothing is padded, or 4-D if sequences are packed)."
        )
    if custom is not None and prefix is not None:
        raise ValueError(
            "A 4-D attention_mask and a cache that already holds tokens do not go together when images are pruned; "
            "pass a 2-D mask of the whole conversation."
        )
    if custom is not None and controller.plan.positions == "compact" and parts.family.positions == "mrope":
        raise ValueError(
            "A 4-D attention_mask (packed sequences) and compact positions do not go together with M-RoPE; use "
            "positions: original, or a 2-D mask."
        )
    return Call(
        labels_BS=controller.labels,
        mask_BS=mask_BS,
        places=_places(controller, kwargs),
        encoded=given_notes(kwargs),
        blocks_BS=_blocks(controller, kwargs, prefix, steps),
        prefix=prefix,
        custom_mask=custom,
    )


def _conversation(controller: Controller, kwargs: Mapping[str, Any], cache: Any, steps: int) -> Prefix | None:
    """What stands in the cache before this call; None if it is empty."""
    if cache is None or int(held_columns(cache)) == 0:
        return None
    earlier = known_prefix(cache, steps)
    if earlier is None or not earlier.cuts:
        mask = kwargs.get("attention_mask")
        length = int(held_columns(cache))
        mask_BP = mask[:, :length] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return Prefix(length, mask_BP=mask_BP)
    check_places(controller, earlier)
    new, new_BQ = new_columns(kwargs, earlier, steps)
    return earlier.grown(new - steps, None if new_BQ is None else new_BQ[:, : new - steps])


def _places(controller: Controller, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """By modality, where placeholders stand."""
    parts, ids = controller.parts, kwargs.get("input_ids")
    if ids is not None:
        return {modality: ids == number for modality, number in parts.placeholder_ids.items()}
    embedding: Any = parts.model.get_input_embeddings()
    embeds, found = kwargs["inputs_embeds"], {}
    for modality, number in parts.placeholder_ids.items():
        # Through the module and not its weight: some scale what they look up.
        row = embedding(torch.full((1, 1), number, device=embeds.device))
        found[modality] = (embeds == row.to(embeds.dtype)).all(-1)
    return found


def _blocks(controller: Controller, kwargs: Mapping[str, Any], prefix: Prefix | None, steps: int) -> Tensor | None:
    """Numbers of the call's blocks that attend both ways; of a longer conversation, its last columns."""
    blocks = controller.parts.family.blocks
    ids_BP = None if blocks is None else blocks.ids(controller.parts.model.config, kwargs)
    if ids_BP is None:
        return None
    # As transformers does: what the caller's ids do not reach (candidates of assisted decoding) is in no block.
    length = steps if prefix is None else prefix.length + steps
    return torch.nn.functional.pad(ids_BP, (0, max(0, length - ids_BP.shape[1])), value=-1)[:, -steps:]


def enter(controller: Controller, call: Call, kwargs: dict[str, Any]) -> bool:
    """Run the stage before the language model and bring its arguments up to date.

    Returns:
        False if the call brought no vision token after all.
    """
    if not any(layout.count for note in call.encoded.values() for layout in note.layouts):
        return False
    parts, plan = controller.parts, controller.plan
    hidden_BSD: Tensor = kwargs["inputs_embeds"]
    B, S, _ = hidden_BSD.shape
    device = hidden_BSD.device
    layouts = {modality: note.layouts for modality, note in call.encoded.items()}
    call.rows = locate(call.places, layouts, plan.scope, parts.family.joins_tiles, parts.family.splits_tiles)
    call.frame = Frame.full(B, S, device, call.mask_BS)
    call.last_vision = call.rows.index_RV.max() if B == 1 else None  # padding repeats a row's last token
    call.last_prompt_B = last_prompt_token(call.labels_BS, call.mask_BS, B, S, device)
    if call.labels_BS is None:
        call.last_prompt_B = (call.last_prompt_B - controller.candidates).clamp(min=0)
    call.positions, call.real_BN = kwargs.get("position_ids"), call.mask_BS
    if call.positions is None:
        past = 0 if call.prefix is None else call.prefix.length
        call.positions = (torch.arange(S, device=device) + past)[None]
    earlier = None if call.prefix is None else call.prefix.at_input()
    if 0 in controller.stage_at:
        kwargs["inputs_embeds"], local_BN, changed = run_stage(controller, 0, hidden_BSD, call)
        if changed or earlier is not None:
            positions, lost_B1 = retained_positions(call, plan.positions)
            leave_cut(call, 0, lost_B1)
            if plan.positions == "compact" and earlier is not None:
                positions = positions - earlier.lost_B1
            for name, dim in INPUT_ROWS.items():
                if local_BN is not None and kwargs.get(name) is not None:
                    kwargs[name] = take(kwargs[name], local_BN, dim)
            kwargs["position_ids"] = call.positions = positions
            kwargs["attention_mask"] = _input_mask(controller, call, kwargs)
            if call.custom_mask is not None:
                call.custom_mask = kwargs["attention_mask"]
    call.real_BN = call.frame.padding(call.mask_BS)
    call.frame = call.frame.as_input()
    if controller.reads_input:
        call.entry = (call.rows, call.frame, kwargs["inputs_embeds"])
    if "logits_to_keep" in kwargs:
        # Gemma 4 shortens the last layers by it; the head does so in any case.
        kwargs["logits_to_keep"] = 0
    return True


def _input_mask(controller: Controller, call: Call, kwargs: Mapping[str, Any]) -> Any:
    """The mask that the language model gets after a stage before it, in the form in which it came."""
    assert call.frame is not None
    mask = kwargs.get("attention_mask")
    if call.custom_mask is not None:
        return custom_mask(call.custom_mask, call.frame)
    if isinstance(mask, dict) or (controller.parts.family.masks_in_core and mask is not None):
        config = controller.parts.text_config
        kinds = [layer_kind(config, layer) for layer in range(len(controller.parts.layers))]
        made = {
            kind: _made_mask(controller, call, kinds.index(kind), kwargs["inputs_embeds"], kwargs, 0)
            for kind in dict.fromkeys(kinds)
        }
        return made if isinstance(mask, dict) else made[kinds[0]]
    padding_BN = _padding(call, 0)
    if padding_BN is not None:
        return padding_BN
    # Never None: position ids with gaps would be taken for packed sequences.
    width = call.frame.width + (0 if call.prefix is None else call.prefix.before(0, call.frame.index_BN.device).width)
    return torch.ones(len(call.frame.index_BN), width, dtype=torch.bool, device=call.frame.index_BN.device)


def _padding(call: Call, layer: int) -> Tensor | None:
    """The 2-D mask of what a layer holds and gets; None if all is real."""
    assert call.frame is not None
    new_BN = call.frame.padding(call.mask_BS)
    if call.prefix is None:
        return new_BN
    old = call.prefix.before(layer, call.frame.index_BN.device)
    return join(old.padding_BN, old.width, new_BN, call.frame.width)


def _made_mask(
    controller: Controller, call: Call, layer: int, hidden_BND: Tensor, kwargs: Mapping[str, Any], cut_layer: int
) -> Any:
    """The mask of one layer whose input was shortened."""
    frame, config, blocks_BL = call.frame, controller.parts.text_config, None
    assert frame is not None
    if call.blocks_BS is not None:
        blocks_BL = take(call.blocks_BS, frame.index_BN, 1)
        if frame.present_BN is not None:
            blocks_BL = blocks_BL.masked_fill(~frame.present_BN, -1)
        if call.prefix is not None:
            old = call.prefix.before(cut_layer, blocks_BL.device)
            blocks_BL = torch.nn.functional.pad(blocks_BL, (old.width, 0), value=-1)
    kind = layer_kind(config, layer)
    return layer_mask(
        config, kind, hidden_BND, _padding(call, cut_layer), kwargs.get("past_key_values"),
        controller.parts.family.keys_of(config, layer), blocks_BL, controller.parts.family.blocks,
        _log_sizes(call, cut_layer),
    )  # fmt: skip


def _log_sizes(call: Call, layer: int) -> Tensor | None:
    """Logarithms of the tokens that each column of a layer stands for, (B, held + N); None if all stand for one."""
    assert call.frame is not None
    new_BN = call.frame.log_size_BN
    if call.prefix is None:
        return new_BN
    old = call.prefix.before(layer, call.frame.index_BN.device)
    return joined(old.log_size_BN, old.width, new_BN, call.frame.width)


def leave_cut(call: Call, layer: int, lost_B1: Tensor) -> None:
    """Note for later calls what a stage did."""
    assert call.frame is not None
    call.cuts.append(Cut.of(layer, call.frame, call.frame.padding(call.mask_BS), lost_B1))


def shorten_layer(
    controller: Controller, call: Call, index: int, layer: Any, hidden_BND: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Run the stage before a layer, if there is one, and bring the layer's arguments up to date.

    Returns:
        The layer's hidden states.
    """
    earlier = None if call.prefix is None else call.prefix.at_layer(index)
    if index in controller.looks_ahead:
        ahead = dict(kwargs)
        _layer_arguments(controller, call, index, hidden_BND, ahead)
        call.behind = LayerInput(layer, index, hidden_BND, ahead)
    if index in controller.stage_at and index > 0:
        hidden_BND, _, changed = run_stage(controller, controller.stage_at[index], hidden_BND, call)
        if changed or (earlier is not None and earlier.layer == index):
            call.memo.clear()
            call.layer_positions, lost_B1 = retained_positions(call, controller.plan.positions)
            leave_cut(call, index, lost_B1)
    _layer_arguments(controller, call, index, hidden_BND, kwargs)
    return hidden_BND


def _layer_arguments(
    controller: Controller, call: Call, index: int, hidden_BND: Tensor, kwargs: dict[str, Any]
) -> None:
    """What a layer behind a stage gets. What is left by the stage before the language model came in, but for sizes."""
    frame = call.frame
    assert frame is not None
    if call.gates is not None:
        kwargs[ARGUMENT] = call.gates
    kind = layer_kind(controller.parts.text_config, index)
    behind = any(cut.layer > 0 for cut in call.cuts) or (
        call.prefix is not None and call.prefix.at_layer(index) is not None
    )
    if not behind and (not call.weighs or kind in RECURRENT):
        return

    def placed() -> Tensor:
        compact = controller.plan.positions == "compact" and call.layer_positions is not None
        assert call.positions is not None
        positions = call.layer_positions if compact else take(call.positions, frame.positioned_BN, -1)
        assert positions is not None
        if compact and call.prefix is not None:
            positions = positions - call.prefix.before(index, positions.device).lost_B1
        return positions

    def turned() -> Any:
        if controller.plan.positions == "original" or call.layer_positions is None:
            return take_rotary(kwargs.get("position_embeddings"), frame.positioned_BN)
        return rotary(controller.parts.language_model, hidden_BND, call.once("positions", placed), kind)

    def masked() -> Any:
        if call.custom_mask is not None:
            mask_BHNN = custom_mask(call.custom_mask, frame)
            if frame.log_size_BN is None or kind in RECURRENT:
                return mask_BHNN
            return weighed(mask_BHNN, frame.log_size_BN, hidden_BND.dtype)
        plain = frame.present_BN is None and call.prefix is None and frame.log_size_BN is None
        if plain and kwargs.get("attention_mask") is None:
            return None  # nothing was padded and nothing is now: spare the host the look at a mask of ones
        return _made_mask(controller, call, index, hidden_BND, kwargs, index)

    kwargs["attention_mask"] = call.once(f"mask {kind}", masked)
    if not behind:
        return
    kwargs["position_embeddings"] = call.once(f"rotary {kind}", turned)
    for name, dim in LAYER_ROWS.items():
        if kwargs.get(name) is not None:
            kwargs[name] = take(kwargs[name], frame.base_BN, dim)
    # Flash attention reads packed sequences out of gaps in the ids; the rotary embedding is all that most layers need.
    reads = controller.parts.family.reads_positions(controller.parts.model.config)
    kwargs["position_ids"] = call.once("positions", placed) if reads else None
