"""A call that continues a conversation whose vision tokens were cut: masks and positions of what the layers hold.

B samples, Q columns since the last prompt with images, N columns of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpcompress.insertion.cache import held_columns, on_host, recall, remember
from tpcompress.insertion.call import Call, Prefix, num_steps
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind, layer_mask
from tpcompress.insertion.shorten.positions import rotary

if TYPE_CHECKING:
    from tpcompress.insertion.hooks import Controller


def begin(controller: Controller, kwargs: dict[str, Any]) -> Call | None:
    """Note what the outer model was called with; None if the cache has no cut of ours."""
    cache, steps = kwargs.get("past_key_values"), num_steps(kwargs)
    prefix = None if cache is None else known_prefix(cache, steps)
    if prefix is None or not prefix.cuts:
        return None
    check_places(controller, prefix)
    core: Any = controller.parts.core
    if prefix.rope_deltas is not None:
        core.rope_deltas = prefix.rope_deltas
    if prefix.weighs and not any(stage.pruner.uses_token_sizes for stage in controller.plan.stages):
        raise ValueError(
            "This cache holds tokens with sizes, which this plan gives none of; go on with the plan it had."
        )
    call = Call(prefix=prefix, new_BQ=new_columns(kwargs, prefix, steps)[1])
    if controller.parts.family.masks_in_core:
        kwargs["attention_mask"] = _input_mask(kwargs, call)
    return call


def check_places(controller: Controller, prefix: Prefix) -> None:
    """See that the stages are where they were when a cache was filled.

    Raises:
        ValueError: they are not.
    """
    odd = [cut.layer for cut in prefix.cuts if cut.layer not in controller.stage_at]
    if odd:
        raise ValueError(
            f"This cache was cut at layer {odd[0]}, but the stages act at {controller.layers}; go on with the layers "
            f"that it was filled with, or read the prompt again."
        )


def known_prefix(cache: Any, steps: int) -> Prefix | None:
    """What an earlier call left on a cache, less the text that was cropped from its end since.

    Assisted decoding reads candidates together with the prompt and takes rejected ones back.
    """
    prefix: Prefix | None = recall(cache, steps)
    if prefix is None or not prefix.cuts or not on_host(held := held_columns(cache), steps):
        return prefix
    fewer = prefix.held(prefix.counted) - int(held)
    if fewer > 0 and prefix.last_vision is not None and fewer < prefix.length - int(prefix.last_vision):
        prefix = prefix.cropped(fewer)
        remember(cache, prefix)
    return prefix


def new_columns(kwargs: Mapping[str, Any], prefix: Prefix, steps: int) -> tuple[int, Tensor | None]:
    """Columns since the prompt, this call's included, and their 2-D mask; None if nothing at all is padded.

    Raises:
        ValueError: mask and cache do not fit.
    """
    mask, cache = kwargs.get("attention_mask"), kwargs["past_key_values"]
    held, counted = held_columns(cache), prefix.held(prefix.counted)
    known = isinstance(mask, Tensor) and mask.ndim == 2
    new = mask.shape[1] - prefix.length if known else steps  # type: ignore[union-attr]
    wrong = new < steps
    if on_host(held, steps):
        wrong = wrong or int(held) < counted or (known and int(held) - counted != new - steps)
        new = int(held) - counted + steps
    if wrong:
        raise ValueError(
            f"Cannot continue here: the attention_mask has {mask.shape[1] if known else 'no'} columns, but the cache "  # type: ignore[union-attr]
            f"stands for a conversation of {prefix.length} prompt columns and {int(held) - counted} after them, and "
            f"{steps} are new. Pass only new tokens, with a mask of the whole conversation or none, and crop a cache "
            f"no further than its answer."
        )
    if known:
        return new, mask[:, prefix.length :].bool()  # type: ignore[index]
    padded = next((cut.padding_BN for cut in prefix.cuts if cut.padding_BN is not None), None)
    if padded is None:
        return new, None
    # Without a mask everything new is real; fillers of the prompt still must be hidden.
    new = int(held) - counted + steps
    return new, torch.ones(len(padded), new, dtype=torch.bool, device=padded.device)


def _input_mask(kwargs: Mapping[str, Any], call: Call) -> Any:
    """The language model's own mask without what was dropped before it."""
    assert call.prefix is not None
    cut, mask = call.prefix.at_input(), kwargs.get("attention_mask")
    return mask if cut is None else cut.padding(call.new_BQ)


def enter(controller: Controller, call: Call, kwargs: dict[str, Any]) -> None:
    """Bring the language model's arguments up to date."""
    assert call.prefix is not None
    cut, positions = call.prefix.at_input(), kwargs.get("position_ids")
    if not controller.parts.family.masks_in_core:
        kwargs["attention_mask"] = _input_mask(kwargs, call)
    if controller.plan.positions == "compact":
        if positions is None:
            hidden = kwargs["inputs_embeds"]
            past = kwargs["past_key_values"].get_seq_length()
            positions = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None]
        kwargs["position_ids"] = positions if cut is None else positions - cut.lost_B1
    call.positions = kwargs.get("position_ids")
    if "logits_to_keep" in kwargs:
        kwargs["logits_to_keep"] = 0  # see `prefill.enter`


def layer_arguments(controller: Controller, call: Call, index: int, hidden_BND: Tensor, kwargs: dict[str, Any]) -> None:
    """Bring a layer's arguments up to date."""
    assert call.prefix is not None
    parts, inner, entry = controller.parts, call.prefix.at_layer(index), call.prefix.at_input()
    kind = layer_kind(parts.text_config, index)
    cut = inner or entry
    if cut is None or (inner is None and (cut.log_size_BN is None or kind in RECURRENT)):
        return

    def turned() -> Any:
        assert call.positions is not None
        return rotary(parts.language_model, hidden_BND, call.positions - cut.lost_B1, kind)

    def masked() -> Any:
        unmasked = kwargs.get("attention_mask") is None
        padding_BN = None if unmasked and cut.whole else cut.padding(call.new_BQ)
        if unmasked and padding_BN is None and cut.log_size_BN is None:
            return None
        return layer_mask(
            parts.text_config, kind, hidden_BND, padding_BN, kwargs["past_key_values"],
            parts.family.keys_of(parts.text_config, index), None, None, cut.log_size_BN,
        )  # fmt: skip

    if inner is not None and controller.plan.positions == "compact":
        if parts.family.reads_positions(parts.model.config) and call.positions is not None:
            kwargs["position_ids"] = call.positions - cut.lost_B1
        kwargs["position_embeddings"] = call.once(f"rotary {kind} {cut.layer}", turned)
    kwargs["attention_mask"] = call.once(f"mask {kind} {cut.layer}", masked)
