"""Installs the hooks and method stand-ins of an attached model, and routes its calls to prefill and decode.

Nothing of a call stays here: it is in the context's `Request`, or on the KV cache. Hooks are excluded from compiled
graphs, which would otherwise be recompiled for the state of every call.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpcompress.insertion import decode, prefill
from tpcompress.insertion.attachment import Attachment
from tpcompress.insertion.cache import counted_layer, remember
from tpcompress.insertion.call import Call
from tpcompress.insertion.encode import EncoderOverride, ExpandOverride
from tpcompress.insertion.encoded import has_pixels
from tpcompress.insertion.gates import GatedAttention
from tpcompress.insertion.layer_arguments import update_in_decode
from tpcompress.insertion.layer_probe import LayerProbe
from tpcompress.insertion.overrides import DeepstackOverride, ForwardOverride, LossOverride, PrefillOverride
from tpcompress.insertion.settings import Placement
from tpcompress.insertion.signatures import named_arguments
from tpcompress.insertion.unpruned import unpruned_message

_layer_lock = threading.Lock()
log = logging.getLogger(__name__)


class Hooks:
    """Hooks and stand-ins of one attached model."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles: list[RemovableHandle] = []
        self.layer_handles: dict[int, RemovableHandle] = {}
        self.layer_users: dict[int, int] = {}
        self.replaced: list[tuple[nn.Module, str, Any]] = []
        self.checked = False  # whether a call with images was seen; threads that race say it twice at most

    def install(self) -> None:
        """Register everything; bound methods only, so that copies and pickles of the model use their own."""
        attachment, parts, pre = self.attachment, self.attachment.parts, {"with_kwargs": True}
        self.handles = [
            parts.core.register_forward_pre_hook(self._core_pre, **pre),
            parts.core.register_forward_hook(self._core_post, always_call=True),
            parts.language_model.register_forward_pre_hook(self._language_model_pre, **pre),
            parts.language_model.register_forward_hook(self._language_model_post),
            *attachment.tower.install(),
        ]
        self._add_layers(attachment.settings.placement)
        model: Any = parts.model
        # PEFT calls `forward` directly, past any hook of the outermost model; and labels must be known before the
        # stages run, because no score may read beyond the prompt.
        self._replace(model, "forward", ForwardOverride(attachment, model.__dict__.get("forward")))
        self._replace(model, "_loss_function", LossOverride(attachment, model.loss_function))
        # For a static cache `generate` builds one 4-D mask; layers of unequal length need one each.
        self._replace(model, "create_masks_for_generate", _keep_2d)
        self._replace(model, "_expand_multimodal_outputs", ExpandOverride(model))
        self._replace(model, "_prefill", PrefillOverride(attachment))
        for modality in parts.placeholder_ids:
            self._replace(parts.core, f"get_{modality}_features", EncoderOverride(attachment, modality))
        if hasattr(parts.language_model, "_deepstack_process"):
            self._replace(parts.language_model, "_deepstack_process", DeepstackOverride(attachment))
        gating = [stage.layer for stage in attachment.plan.stages if stage.pruner.gates]
        if gating:
            for layer in parts.layers[min(gating) :]:
                attention: Any = layer.self_attn
                self._replace(attention, "forward", GatedAttention(attention, attention.__dict__.get("forward")))

    def uninstall(self) -> None:
        """Undo `install`."""
        for handle in [*self.handles, *self.layer_handles.values()]:
            handle.remove()
        for module, name, before in reversed(self.replaced):
            del module.__dict__[name]
            if before is not None:
                module.__dict__[name] = before
        self.replaced = []

    @contextmanager
    def placed(self, placement: Placement) -> Iterator[None]:
        """Run a block with stages at other layers, in this context; layers get the hooks that they need for it."""
        self._add_layers(placement)
        try:
            with self.attachment.using(placement=placement):
                yield
        finally:
            self._remove_layers(placement)

    def _add_layers(self, placement: Placement) -> None:
        with _layer_lock:
            for index in sorted(placement.hooked):
                self.layer_users[index] = self.layer_users.get(index, 0) + 1
                if index not in self.layer_handles:
                    layer = self.attachment.parts.layers[index]
                    hook = functools.partial(self._layer_pre, index)
                    self.layer_handles[index] = layer.register_forward_pre_hook(hook, with_kwargs=True)

    def _remove_layers(self, placement: Placement) -> None:
        with _layer_lock:
            for index in placement.hooked:
                self.layer_users[index] -= 1
                if not self.layer_users[index]:
                    self.layer_handles.pop(index).remove()

    def _replace(self, module: nn.Module, name: str, stand_in: Any) -> None:
        self.replaced.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = stand_in

    # ------------------------------------------------------------------ core model

    @torch.compiler.disable
    def _core_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        attachment, request = self.attachment, self.attachment.begin_inner()
        request.call = None
        if attachment.settings.mode == "off":
            return None
        kwargs = named_arguments(module, args, kwargs)
        begin = prefill.begin if has_pixels(kwargs) else decode.begin
        if begin is decode.begin:
            decode.warn_of_merged(attachment, kwargs)
        request.call = begin(attachment, request, kwargs)
        return (), kwargs

    @torch.compiler.disable
    def _core_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        """End the call of a core model that was called directly, also if it raised."""
        self.attachment.end_inner()

    # ------------------------------------------------------------------ language model

    @torch.compiler.disable
    def _language_model_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        request = self.attachment.request
        if request is None or request.call is None:
            return None
        call, kwargs = request.call, named_arguments(module, args, kwargs)
        if not call.is_prefill:
            decode.enter(self.attachment, call, kwargs)
        elif not prefill.enter(self.attachment, call, kwargs, request.num_candidates):
            request.call = None
        return (), kwargs

    @torch.compiler.disable
    def _language_model_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A prefill leaves its cuts on the cache; one that cut nothing removes those of an earlier request."""
        cache, call = getattr(output, "past_key_values", None), self.attachment.call
        if call is not None and call.is_prefill and not self.checked and not call.settings.traces:
            self.checked = True
            self._warn_unpruned(call)
        if call is not None and call.is_prefill and cache is not None:
            rope_deltas = getattr(self.attachment.parts.core, "rope_deltas", None)
            remember(cache, call.end(counted_layer(cache), rope_deltas))

    def _warn_unpruned(self, call: Call) -> None:
        """Say once if the first call with images retains all of their tokens under the plan's own budgets.

        Not in a `record` block, which shows the counts.
        """
        rows, plan = call.rows, self.attachment.plan
        own = call.settings.budgets == tuple(stage.budget for stage in plan.stages) and call.settings.mode == "drop"
        asked = any(stage.budget.keep_ratio != 1.0 for stage in plan.stages)
        if rows is None or not own or not asked or rows.count != rows.total:
            return
        if all(stage.pruner.exact_count for stage in plan.stages):
            where, images = "the first call with images", [sum(rows.total) // rows.num_images]
            log.warning("%s", unpruned_message(plan, rows.total, where, images))

    # ------------------------------------------------------------------ decoder layers

    @torch.compiler.disable
    def _layer_pre(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        attachment, call = self.attachment, self.attachment.call
        if call is None or index not in call.settings.placement.hooked:
            return None
        kwargs = named_arguments(layer, args, kwargs)
        # Hidden states stay positional: reentrant checkpointing requires it.
        first = next(iter(kwargs)) if args else "hidden_states"
        hidden_BND = kwargs.pop(first)
        if call.is_prefill:
            hidden_BND = prefill.shorten_layer(attachment, call, index, layer, hidden_BND, kwargs)
            if index in call.settings.placement.watched:
                call.before = LayerProbe(layer, index, hidden_BND, kwargs)
        else:
            update_in_decode(attachment, call, index, hidden_BND, kwargs)
        return ((hidden_BND,), kwargs) if args else (args, {first: hidden_BND} | kwargs)


def _keep_2d(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask
