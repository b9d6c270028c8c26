"""What is known during one forward call, and what a request carries from its prefill to its decode steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.sequence import Frame, Rows
from tpcompress.insertion.views import LayerInput

STATE = "_tpcompress_state"
"""Attribute of a KV cache that carries the request's `Prefix`."""


@dataclass(frozen=True)
class Cut:
    """What decode steps must know of one stage. B samples, N columns that its layers hold after the prefill.

    Attributes:
        layer: first layer with the shortened cache.
        width: N.
        padding_BN: True on real columns; None if all are.
        whole: no column is a filler or hidden, so only the caller's own padding can be in `padding_BN`.
        lost_B1: tokens that the sample lost since the language model's input; compact positions are behind by it.
    """

    layer: int
    width: int
    padding_BN: Tensor | None
    whole: bool
    lost_B1: Tensor

    @classmethod
    def of(cls, layer: int, frame: Frame, padding_BN: Tensor | None) -> Cut:
        """The cut that led to a frame."""
        lost_B1 = torch.tensor(frame.lost, device=frame.index_BN.device)[:, None]
        return cls(layer, frame.width, padding_BN, frame.present_BN is None, lost_B1)

    def padding(self, new_BQ: Tensor | None) -> Tensor | None:
        """The 2-D mask of prefill and later columns together, bool (B, N + Q); None if all are real."""
        if new_BQ is None:
            return None
        old_BN = new_BQ.new_ones(new_BQ.shape[0], self.width) if self.padding_BN is None else self.padding_BN
        return torch.cat([old_BN, new_BQ], 1)


@dataclass
class Prefix:
    """What a request's cache carries: the original prompt length and the cuts of its prefill."""

    length: int
    cuts: list[Cut] = field(default_factory=list)

    def at_input(self) -> Cut | None:
        """The cut before the language model, if there was one."""
        return next((cut for cut in self.cuts if cut.layer == 0), None)

    def at_layer(self, layer: int) -> Cut | None:
        """The last cut inside the language model that a layer stands behind."""
        return next((cut for cut in reversed(self.cuts) if 0 < cut.layer <= layer), None)


@dataclass
class Call:
    """State of one forward call. It lives exactly as long as the call.

    Attributes:
        labels_BS: the caller's labels.
        mask_BS: the caller's 2-D mask over the original sequence (prefill).
        rows, frame: vision tokens and sequence at hand; None in a call without images.
        last_prompt_B: original position of the last prompt token.
        prefix: what the cache carries: being written in a prefill, read in a decode step.
        new_BQ: 2-D mask of everything after the prompt (decode); None if all of it and of the prompt is real.
        custom_mask: a caller's 4-D mask over the language model's input.
        cut_inside: a stage inside the language model has acted, so later layers need shortened arguments.
        before: input of the layer before the next stage, if that stage reads keys or attention.
        memo: shortened copies of arguments that the layers share.
    """

    labels_BS: Tensor | None = None
    mask_BS: Tensor | None = None
    rows: Rows | None = None
    frame: Frame | None = None
    last_prompt_B: Tensor | None = None
    prefix: Prefix | None = None
    new_BQ: Tensor | None = None
    custom_mask: Tensor | None = None
    cut_inside: bool = False
    before: LayerInput | None = None
    memo: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)

    def once(self, name: str, source: Any, make: Any) -> Any:
        """`make(source)`, computed once for all layers that pass the same object."""
        key = (name, id(source))
        if key not in self.memo:
            self.memo[key] = (source, make(source))
        return self.memo[key][1]


def last_prompt_token(labels_BS: Tensor | None, mask_BS: Tensor | None, B: int, S: int, device: torch.device) -> Tensor:
    """Position (B,) of the token before the first label, or of the last real token where there is no label."""
    last_B = torch.full((B,), S - 1, device=device)
    if mask_BS is not None:
        last_B = last_B - mask_BS.flip(1).to(torch.int8).argmax(1)
    if labels_BS is None:
        return last_B
    labelled_BS = labels_BS != -100
    first_B = labelled_BS.to(torch.int8).argmax(1) - 1
    return torch.where(labelled_BS.any(1), first_B, last_B).clamp(min=0)


def num_steps(kwargs: dict) -> int:
    """New columns of a call."""
    ids = kwargs.get("input_ids")
    given: Tensor = kwargs["inputs_embeds"] if ids is None else ids
    return given.shape[1]


def on_host(length: Any, steps: int) -> bool:
    """A static cache knows its length on the device only; asking makes the host wait, so not at every decode step."""
    return isinstance(length, int) or steps > 1


def emptied(cache: Any, steps: int) -> bool:
    """Whether a cache was reset since the request that it remembers."""
    length = cache.get_seq_length()
    return on_host(length, steps) and int(length) == 0


def packed(positions: Tensor | None) -> bool:
    """Whether transformers would read position ids as packed sequences."""
    return positions is not None and bool((positions.diff(dim=-1) != 1).any())
