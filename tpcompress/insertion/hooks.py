"""The hooks of one attached model: outer model, language model and decoder layers, and nothing else.

State of a request never stays here: it lives in the `Call`, or on the request's KV cache. Hooks stay out of compiled
graphs, which would otherwise be made anew for every call's state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpcompress.families import Parts
from tpcompress.insertion import decode, prefill
from tpcompress.insertion.cache import counted_layer, remember
from tpcompress.insertion.call import Call, parameters_of
from tpcompress.insertion.encode import EncoderTap, ExpandTap, has_pixels
from tpcompress.insertion.gates import GatedAttention
from tpcompress.insertion.layer_probe import LayerInput
from tpcompress.insertion.overrides import DeepstackTap, ForwardTap, ShortenedLoss
from tpcompress.insertion.plan import Budget, PruningPlan
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.insertion.views.tower import TowerWatch
from tpcompress.pruners.base import BEFORE_VIEWS

MODES = ("drop", "mask", "off")


class Controller:
    """Runs the stages of a plan on one model."""

    def __init__(self, parts: Parts, plan: PruningPlan, pruners: nn.ModuleList) -> None:
        self.parts, self.plan, self.pruners = parts, plan, pruners
        self.mode = "drop"
        self.budgets: list[Budget] = [stage.budget for stage in plan.stages]
        self.traces: list[Trace] = []
        self.call: Call | None = None
        self.labels: Tensor | None = None
        self.candidates = 0
        self.encoding = False
        self.handles: list[RemovableHandle] = []
        self.layer_handles: list[RemovableHandle] = []
        self.replaced: list[tuple[nn.Module, str, Any]] = []
        self.included: dict[int, StageTrace] | None = None
        self.tower = TowerWatch(parts, [stage.pruner for stage in plan.stages])
        self.reads_input = any("input" in s.pruner.needs for s in plan.stages)
        self._place([stage.layer for stage in plan.stages])

    def _place(self, layers: Sequence[int]) -> None:
        """Note at which layer each stage acts, and what follows from it."""
        placed = [(stage.pruner, layer) for stage, layer in zip(self.plan.stages, layers, strict=True)]
        self.layers = list(layers)
        self.stage_at = {layer: number for number, layer in enumerate(layers)}
        self.watched = {layer - 1 for rule, layer in placed if layer and rule.needs & BEFORE_VIEWS}
        self.looks_ahead = {layer for rule, layer in placed if layer and "attention_next" in rule.needs}

    def set_mode(self, mode: str) -> None:
        """Switch between `drop`, `mask` and `off`."""
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        self.mode = mode

    def set_budgets(self, budgets: Sequence[Budget]) -> None:
        """Replace the budgets of the stages, one each."""
        if len(budgets) != len(self.plan.stages):
            raise ValueError(f"The plan has {len(self.plan.stages)} stages, got {len(budgets)} budgets.")
        self.budgets = list(budgets)

    def set_layers(self, layers: Sequence[int]) -> None:
        """Move the stages, each to a layer of its own."""
        for handle in self.layer_handles:
            handle.remove()
        self.layer_handles = []
        self._place(layers)
        self._install_layers()

    def install(self) -> None:
        """Register everything; bound methods only, so that copies and pickles of the model keep their own."""
        parts, pre = self.parts, {"with_kwargs": True}
        self.handles = [
            parts.core.register_forward_pre_hook(self._core_pre, **pre),
            parts.language_model.register_forward_pre_hook(self._language_model_pre, **pre),
            parts.language_model.register_forward_hook(self._language_model_post),
            *self.tower.install(),
        ]
        self._install_layers()
        model: Any = parts.model
        # PEFT calls `forward` directly, so a hook on the outermost model would be passed by; and the labels must be
        # seen before the stages run, because no score may look past the prompt.
        self._replace(model, "forward", ForwardTap(self, model.__dict__.get("forward")))
        self._replace(model, "_loss_function", ShortenedLoss(self, model.loss_function))
        # For a static cache `generate` builds one 4-D mask; layers of unequal length must make their own.
        self._replace(model, "create_masks_for_generate", _keep_2d)
        self._replace(model, "_expand_multimodal_outputs", ExpandTap(model))
        for modality in parts.placeholder_ids:
            self._replace(parts.core, f"get_{modality}_features", EncoderTap(self, modality))
        if hasattr(parts.language_model, "_deepstack_process"):
            self._replace(parts.language_model, "_deepstack_process", DeepstackTap(self))
        gating = [stage.layer for stage in self.plan.stages if stage.pruner.gates]
        if gating:
            for layer in parts.layers[min(gating) :]:
                attention: Any = layer.self_attn
                self._replace(attention, "forward", GatedAttention(attention, attention.__dict__.get("forward")))

    def _install_layers(self) -> None:
        """Register what layers need where the stages are now."""
        inside = [layer for layer in self.layers if layer > 0]
        # Sizes and gates given before the language model act in every layer.
        rules = [stage.pruner for stage, layer in zip(self.plan.stages, self.layers, strict=True) if layer == 0]
        every = any(rule.uses_token_sizes or rule.gates for rule in rules)
        first = 0 if every else min(inside, default=len(self.parts.layers))
        for index, layer in enumerate(self.parts.layers):
            if index >= first or index in self.watched:
                hook = functools.partial(self._layer_pre, index)
                self.layer_handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def uninstall(self) -> None:
        """Undo `install`."""
        for handle in self.handles + self.layer_handles:
            handle.remove()
        for module, name, before in reversed(self.replaced):
            del module.__dict__[name]
            if before is not None:
                module.__dict__[name] = before
        self.replaced = []

    def _replace(self, module: nn.Module, name: str, stand_in: Any) -> None:
        self.replaced.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = stand_in

    # ------------------------------------------------------------------ outer model

    @torch.compiler.disable
    def _core_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.call = None
        if self.mode == "off":
            return None
        kwargs = _named(module, args, kwargs)
        self.call = prefill.begin(self, kwargs) if has_pixels(kwargs) else decode.begin(self, kwargs)
        return (), kwargs

    # ------------------------------------------------------------------ language model

    @torch.compiler.disable
    def _language_model_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            return None
        kwargs = _named(module, args, kwargs)
        if not call.is_prefill:
            decode.enter(self, call, kwargs)
        elif not prefill.enter(self, call, kwargs):
            self.call = None
        return (), kwargs

    @torch.compiler.disable
    def _language_model_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A prefill leaves its cuts on the cache; a prefill that cut nothing wipes what an earlier request left."""
        cache, call = getattr(output, "past_key_values", None), self.call
        if call is not None and call.is_prefill and cache is not None:
            remember(cache, call.end(counted_layer(cache), getattr(self.parts.core, "rope_deltas", None)))

    # ------------------------------------------------------------------ decoder layers

    @torch.compiler.disable
    def _layer_pre(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            return None
        # Only hidden states stay positional: reentrant checkpointing asks for that.
        kwargs = _named(layer, args, kwargs)
        first = next(iter(kwargs)) if args else "hidden_states"
        hidden_BND = kwargs.pop(first)
        if call.is_prefill:
            hidden_BND = prefill.shorten_layer(self, call, index, layer, hidden_BND, kwargs)
            if index in self.watched:
                call.before = LayerInput(layer, index, hidden_BND, kwargs)
        else:
            decode.layer_arguments(self, call, index, hidden_BND, kwargs)
        return ((hidden_BND,), kwargs) if args else (args, {first: hidden_BND} | kwargs)


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments by name, in a dict of our own."""
    return dict(zip(parameters_of(type(module).forward), args, strict=False)) | kwargs


def _keep_2d(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask
