"""Calls without images that continue a conversation whose vision tokens were cut.

B samples, Q columns since the last prompt with images, N columns of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.attachment import Attachment, Request
from tpcompress.insertion.cache import held_columns, on_host, recall, remember
from tpcompress.insertion.call import Call, num_steps
from tpcompress.insertion.conversation import CachedPrefix
from tpcompress.insertion.settings import Placement


def begin(attachment: Attachment, request: Request, kwargs: dict[str, Any]) -> Call | None:
    """The state of a call with these arguments of the core model; None if its cache holds no cut."""
    cache, steps = kwargs.get("past_key_values"), num_steps(kwargs)
    prefix = None if cache is None else known_prefix(cache, steps)
    if prefix is None or not prefix.cuts:
        return None
    settings = attachment.settings
    check_cuts(settings.placement, prefix)
    core: Any = attachment.parts.core
    if prefix.rope_deltas is not None:
        core.rope_deltas = prefix.rope_deltas
    if prefix.has_sizes and not any(stage.pruner.uses_token_sizes for stage in attachment.plan.stages):
        raise ValueError(
            "This cache holds tokens with sizes, but no pruner of this plan uses them; continue it with its own plan."
        )
    call = Call(settings, prefix=prefix, new_BQ=new_columns(kwargs, prefix, steps)[1])
    if attachment.parts.family.masks_in_core:
        kwargs["attention_mask"] = _input_mask(kwargs, call)
    return call


def warn_of_merged(attachment: Attachment, kwargs: Mapping[str, Any]) -> None:
    """Warn once of a prompt that comes as embeddings alone: image features in it cannot be told from words."""
    embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
    if embeds is None or kwargs.get("input_ids") is not None or embeds.shape[1] == 1:
        return
    if cache is None or int(held_columns(cache)) == 0:
        attachment.warn_once(
            "A prompt came as inputs_embeds without input_ids and pixel_values, so it is not pruned: image features "
            "that were merged into it cannot be found. Pass input_ids and pixel_values to the model."
        )


def enter(attachment: Attachment, call: Call, kwargs: dict[str, Any]) -> None:
    """Update the arguments of the language model."""
    assert call.prefix is not None
    cut, positions = call.prefix.at_input(), kwargs.get("position_ids")
    if not attachment.parts.family.masks_in_core:
        kwargs["attention_mask"] = _input_mask(kwargs, call)
    if attachment.plan.positions == "compact":
        if positions is None:
            hidden = kwargs["inputs_embeds"]
            past = kwargs["past_key_values"].get_seq_length()
            positions = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None]
        kwargs["position_ids"] = positions if cut is None else positions - cut.num_dropped_B1
    call.positions = kwargs.get("position_ids")
    if "logits_to_keep" in kwargs:
        kwargs["logits_to_keep"] = 0  # see `prefill.enter`


def check_cuts(placement: Placement, prefix: CachedPrefix) -> None:
    """Check that the stages are at the layers at which a cache was cut.

    Raises:
        ValueError: they are at others.
    """
    odd = [cut.layer for cut in prefix.cuts if cut.layer not in placement.stage_at]
    if odd:
        raise ValueError(
            f"This cache was cut at layer {odd[0]}, but the stages act at {list(placement.layers)}; continue it with "
            f"the layers that it was filled with, or run the prompt again."
        )


def known_prefix(cache: Any, steps: int) -> CachedPrefix | None:
    """The conversation that an earlier call left on a cache, without text that was cropped from its end since.

    Assisted decoding reads candidates together with the prompt and crops the rejected ones.
    """
    prefix: CachedPrefix | None = recall(cache, steps)
    if prefix is None or not prefix.cuts or not on_host(held := held_columns(cache), steps):
        return prefix
    fewer = prefix.held(prefix.counted) - int(held)
    if fewer > 0 and prefix.last_vision is not None and fewer < prefix.length - int(prefix.last_vision):
        prefix = prefix.cropped(fewer)
        remember(cache, prefix)
    return prefix


def new_columns(kwargs: Mapping[str, Any], prefix: CachedPrefix, steps: int) -> tuple[int, Tensor | None]:
    """Number of columns since the prompt, this call's included, and their 2-D mask; None if nothing is padded.

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
    # Without a mask all new columns are real; fillers of the prompt still must be hidden.
    new = int(held) - counted + steps
    return new, torch.ones(len(padded), new, dtype=torch.bool, device=padded.device)


def _input_mask(kwargs: Mapping[str, Any], call: Call) -> Any:
    """The language model's mask without the columns that were dropped before it."""
    assert call.prefix is not None
    cut, mask = call.prefix.at_input(), kwargs.get("attention_mask")
    return mask if cut is None else cut.padding(call.new_BQ)
