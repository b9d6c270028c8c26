"""The hooks of one attached model: outer model, language model and decoder layers, and nothing else.

State of a request never stays here: it lives in the `Call`, or on the request's KV cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpcompress.families import Parts
from tpcompress.insertion.call import (
    STATE,
    Call,
    Prefix,
    emptied,
    last_prompt_token,
    num_steps,
    on_host,
    packed,
)
from tpcompress.insertion.masks import custom_mask, layer_mask
from tpcompress.insertion.plan import Budget, PruningPlan
from tpcompress.insertion.sequence import Frame, locate, take
from tpcompress.insertion.stage import run_stage
from tpcompress.insertion.taps import ForwardTap, ShortenedLoss
from tpcompress.insertion.trace import Trace
from tpcompress.insertion.views import LAYER_VIEWS, LayerInput

MODES = ("drop", "mask", "off")
STAND_INS = ("forward", "_loss_function", "create_masks_for_generate")
"""Attributes of the outermost model that an attached plan replaces."""


class Controller:
    """Runs the stages of a plan on one model."""

    def __init__(self, parts: Parts, plan: PruningPlan, pruners: nn.ModuleList) -> None:
        self.parts, self.plan, self.pruners = parts, plan, pruners
        self.mode = "drop"
        self.budgets: list[Budget] = [stage.budget for stage in plan.stages]
        self.traces: list[Trace] = []
        self.call: Call | None = None
        self.labels: Tensor | None = None
        self.replaced: dict[str, Any] = {}
        self.handles: list[RemovableHandle] = []
        self.stage_at = {stage.layer: number for number, stage in enumerate(plan.stages)}
        self.watched = {s.layer - 1 for s in plan.stages if s.layer and s.rule.needs & LAYER_VIEWS}

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

    def install(self) -> None:
        """Register everything; bound methods only, so that copies and pickles of the model keep their own."""
        parts, pre = self.parts, {"with_kwargs": True}
        self.handles = [
            parts.core.register_forward_pre_hook(self._core_pre, **pre),
            parts.language_model.register_forward_pre_hook(self._language_model_pre, **pre),
            parts.language_model.register_forward_hook(self._language_model_post),
        ]
        inside = [layer for layer in self.stage_at if layer > 0]
        first = min(inside, default=len(parts.layers))
        for index, layer in enumerate(parts.layers):
            if index >= first or index in self.watched:
                hook = functools.partial(self._layer_pre, index)
                self.handles.append(layer.register_forward_pre_hook(hook, **pre))
        # PEFT calls `forward` directly, so a hook on the outermost model would be passed by; and the labels must be
        # seen before the stages run, because no score may look past the prompt.
        model: Any = parts.model
        self.replaced = {name: model.__dict__[name] for name in STAND_INS if name in model.__dict__}
        model.forward = ForwardTap(self, model.__dict__.get("forward"))
        model.loss_function = ShortenedLoss(self, model.loss_function)
        # For a static cache `generate` builds one 4-D mask; layers of unequal length must make their own.
        model.create_masks_for_generate = _keep_2d

    def uninstall(self) -> None:
        """Undo `install`."""
        for handle in self.handles:
            handle.remove()
        attributes = self.parts.model.__dict__
        for name in STAND_INS:
            attributes.pop(name, None)
        attributes.update(self.replaced)

    # ------------------------------------------------------------------ outer model

    def _core_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.call = None
        if self.mode == "off":
            return None
        kwargs = _named(module, args, kwargs)
        cache, prefix = kwargs.get("past_key_values"), None
        if cache is not None:
            prefix = getattr(cache, STATE, None)
        images = self.parts.family.image_tokens(self.parts.model.config, kwargs)
        if images is not None:
            self.call = self._begin_prefill(kwargs, images)
        elif prefix is not None and prefix.cuts and not emptied(cache, num_steps(kwargs)):
            self.call = Call(prefix=prefix)
            kwargs["attention_mask"] = self._begin_decode(self.call, kwargs, prefix)
        return (), kwargs

    def _begin_prefill(self, kwargs: dict, images: Any) -> Call:
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise ValueError(
                "An image in a continued conversation (or a chunked prefill) cannot be pruned: the cache already holds "
                "tokens. Start from the full prompt with an empty cache and without prefill_chunk_size."
            )
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        placeholder_BS: Tensor
        if ids is not None:
            placeholder_BS = ids == self.parts.placeholder_id
        else:
            embedding: Any = self.parts.model.get_input_embeddings()
            placeholder_BS = (embeds == embedding.weight[self.parts.placeholder_id]).all(-1)
        mask = kwargs.get("attention_mask")
        mask_BS = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        B, S = placeholder_BS.shape
        device = placeholder_BS.device
        return Call(
            labels_BS=self.labels,
            mask_BS=mask_BS,
            rows=locate(placeholder_BS, images, self.plan.scope),
            frame=Frame.full(B, S, device, mask_BS),
            last_prompt_B=last_prompt_token(self.labels, mask_BS, B, S, device),
            prefix=Prefix(S),
        )

    def _begin_decode(self, call: Call, kwargs: dict, prefix: Prefix) -> Any:
        """Note the mask of the new columns; the language model's own mask loses what was dropped before it."""
        mask, cut = kwargs.get("attention_mask"), prefix.at_input()
        steps, seen = num_steps(kwargs), kwargs["past_key_values"].get_seq_length()
        held = prefix.length if cut is None else cut.width
        if isinstance(mask, Tensor) and mask.ndim == 2:
            call.new_BQ = mask[:, prefix.length :].bool()
            new = call.new_BQ.shape[1]
            wrong = new < steps or (on_host(seen, steps) and int(seen) != held + new - steps)
        else:
            positions = kwargs.get("position_ids")
            # `generate` leaves a mask of ones out; its position ids still tell where it believes to be.
            wrong = steps > 1 and positions is not None and int(positions[..., 0].min()) < prefix.length + seen - held
            if any(known.padding_BN is not None for known in prefix.cuts):
                rows, device = prefix.cuts[0].lost_B1.shape[0], prefix.cuts[0].lost_B1.device
                call.new_BQ = torch.ones(rows, int(seen) - held + steps, dtype=torch.bool, device=device)
        if wrong:
            raise ValueError(
                "Cannot continue here: mask or tokens do not fit the cache, which holds fewer tokens than the "
                "conversation because vision tokens were dropped before the language model. Pass only new tokens with "
                "a mask of the whole conversation, or the full prompt without the cache."
            )
        return mask if cut is None else cut.padding(call.new_BQ)

    # ------------------------------------------------------------------ language model

    def _language_model_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            return None
        kwargs = _named(module, args, kwargs)
        if call.frame is None:
            return (), self._decode_input(kwargs, call)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None and kwargs.get("past_key_values") is None and packed(positions):
            raise ValueError(
                "position_ids without an attention_mask are read as packed sequences, which a pruned sequence cannot "
                "be; pass an attention_mask (all ones if nothing is padded, or 4-D if sequences are packed)."
            )
        if 0 in self.stage_at:
            hidden_BSD = kwargs["inputs_embeds"]
            S = hidden_BSD.shape[1]
            kwargs["inputs_embeds"], local_BN, changed = run_stage(self, 0, hidden_BSD, call)
            if changed:
                if positions is None:
                    positions = torch.arange(S, device=hidden_BSD.device)[None]
                if local_BN is not None:
                    positions = take(positions, local_BN, -1)
                if self.plan.positions == "compact":
                    positions = positions - call.frame.shift_BN
                kwargs["position_ids"] = positions
                if isinstance(mask, Tensor) and mask.ndim == 4:
                    mask = custom_mask(mask, call.frame)
                else:
                    padding_BN = call.frame.padding(call.mask_BS)
                    # Never None: position ids with gaps would be taken for packed sequences.
                    mask = torch.ones_like(call.frame.index_BN) if padding_BN is None else padding_BN
                kwargs["attention_mask"] = mask
        call.frame = call.frame.as_input()
        call.custom_mask = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
        return (), kwargs

    def _decode_input(self, kwargs: dict, call: Call) -> dict:
        assert call.prefix is not None
        cut = call.prefix.at_input()
        if cut is None:
            return kwargs
        positions = kwargs.get("position_ids")
        if positions is None:
            steps = kwargs["inputs_embeds"].shape[1]
            past = int(kwargs["past_key_values"].get_seq_length()) + call.prefix.length - cut.width
            positions = (torch.arange(steps, device=cut.lost_B1.device) + past)[None]
        kwargs["position_ids"] = positions - cut.lost_B1 if self.plan.positions == "compact" else positions
        return kwargs

    def _language_model_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A prefill leaves its cuts on the cache; a prefill that cut nothing wipes what an earlier request left."""
        cache = getattr(output, "past_key_values", None)
        if self.call is not None and self.call.frame is not None and cache is not None:
            setattr(cache, STATE, self.call.prefix)

    # ------------------------------------------------------------------ decoder layers

    def _layer_pre(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            return None
        kwargs = dict(kwargs)
        hidden_BND = args[0] if args else kwargs["hidden_states"]
        if call.frame is None:
            self._decode_arguments(index, hidden_BND, kwargs, call)
            return args, kwargs
        if index in self.stage_at and index > 0:
            hidden_BND, _, changed = run_stage(self, self.stage_at[index], hidden_BND, call)
            if changed:
                call.cut_inside = True
                call.memo.clear()
        if call.cut_inside:
            self._prefill_arguments(index, hidden_BND, kwargs, call)
        if index in self.watched:
            rotary = kwargs["position_embeddings"]
            call.before = LayerInput(layer, hidden_BND, rotary, kwargs.get("attention_mask"))
        if args:
            return (hidden_BND, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden_BND}

    def _prefill_arguments(self, index: int, hidden_BND: Tensor, kwargs: dict, call: Call) -> None:
        frame = call.frame
        assert frame is not None
        text: Any = self.parts.language_model

        def rotary(source: Any) -> Any:
            if self.plan.positions == "original":
                return tuple(take(x, frame.base_BN, -2) for x in source)
            positions = take(kwargs["position_ids"], frame.base_BN, -1) - frame.shift_BN
            return text.rotary_emb(hidden_BND, position_ids=positions)

        def mask(source: Any) -> Any:
            if call.custom_mask is not None:
                return custom_mask(call.custom_mask, frame)
            if source is None and frame.present_BN is None:
                return None  # nothing was padded and nothing is now: spare the host the look at a mask of ones
            padding_BN = frame.padding(call.mask_BS)
            return layer_mask(text.config, hidden_BND, padding_BN, kwargs.get("past_key_values"), index, source)

        kwargs["position_embeddings"] = call.once("rotary", kwargs["position_embeddings"], rotary)
        kwargs["attention_mask"] = call.once("mask", kwargs.get("attention_mask"), mask)
        # Flash attention reads packed sequences out of gaps in the ids; the rotary embedding is all that layers need.
        kwargs["position_ids"] = None

    def _decode_arguments(self, index: int, hidden_BND: Tensor, kwargs: dict, call: Call) -> None:
        assert call.prefix is not None
        cut = call.prefix.at_layer(index)
        if cut is None:
            return
        text: Any = self.parts.language_model
        new_BQ = call.new_BQ

        def rotary(source: Any) -> Any:
            return text.rotary_emb(hidden_BND, position_ids=kwargs["position_ids"] - cut.lost_B1)

        def mask(source: Any) -> Any:
            padding_BN = None if source is None and cut.whole else cut.padding(new_BQ)
            return layer_mask(text.config, hidden_BND, padding_BN, kwargs["past_key_values"], index, source)

        if self.plan.positions == "compact":
            kwargs["position_embeddings"] = call.once(f"rotary{cut.layer}", kwargs["position_embeddings"], rotary)
        kwargs["attention_mask"] = call.once(f"mask{cut.layer}", kwargs.get("attention_mask"), mask)


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments by name, in a dict of our own."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _keep_2d(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask
