"""What is known during one forward call, and what a request carries from one call to the next.

B samples, S columns of a call, P columns of the conversation before it, N columns that some layer holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.encode import Encoded
from tpcompress.insertion.gates import Gates
from tpcompress.insertion.shorten.sequence import Frame, Rows
from tpcompress.insertion.shorten.sizes import joined
from tpcompress.insertion.views.build import LayerInput


@dataclass(frozen=True)
class Cut:
    """What later calls must know of one stage.

    Attributes:
        layer: first layer with the shortened cache.
        width: N, columns that those layers hold of the conversation so far.
        padding_BN: True on real columns; None if all are.
        whole: no column is a filler or hidden, so only the caller's own padding can be in `padding_BN`.
        lost_B1: positions that the sample lost since the language model's input; compact positions are behind by it.
        log_size_BN: fp32, logarithm of the number of tokens that each column stands for; None if all stand for one.
    """

    layer: int
    width: int
    padding_BN: Tensor | None
    whole: bool
    lost_B1: Tensor
    log_size_BN: Tensor | None = None

    @classmethod
    def of(cls, layer: int, frame: Frame, padding_BN: Tensor | None, lost_B1: Tensor) -> Cut:
        """The cut that led to a frame."""
        return cls(layer, frame.width, padding_BN, frame.present_BN is None, lost_B1, frame.log_size_BN)

    def padding(self, new_BQ: Tensor | None) -> Tensor | None:
        """The 2-D mask of these columns and of later ones, bool (B, N + Q); None if all are real."""
        return None if new_BQ is None else join(self.padding_BN, self.width, new_BQ, new_BQ.shape[1])

    def after(self, before: Cut) -> Cut:
        """This cut of a later call behind what its layers already held."""
        padding_BN = join(before.padding_BN, before.width, self.padding_BN, self.width)
        lost_B1 = self.lost_B1 + before.lost_B1
        log_size_BN = joined(before.log_size_BN, before.width, self.log_size_BN, self.width)
        return Cut(self.layer, before.width + self.width, padding_BN, before.whole and self.whole, lost_B1, log_size_BN)

    def grown(self, steps: int, new_BQ: Tensor | None) -> Cut:
        """This cut after `steps` more columns, whose 2-D mask is `new_BQ`."""
        padding_BN = join(self.padding_BN, self.width, new_BQ, steps)
        log_size_BN = joined(self.log_size_BN, self.width, None, steps)
        return replace(self, width=self.width + steps, padding_BN=padding_BN, log_size_BN=log_size_BN)

    def cropped(self, steps: int) -> Cut:
        """This cut without its last columns."""
        padding_BN, log_size_BN = (None if x is None else x[:, :-steps] for x in (self.padding_BN, self.log_size_BN))
        return replace(self, width=self.width - steps, padding_BN=padding_BN, log_size_BN=log_size_BN)


@dataclass(frozen=True)
class Prefix:
    """What a request's cache carries.

    Attributes:
        length: P, columns of the conversation when the last prompt with images had been read.
        cuts: the stages that acted in it, at rising layers.
        mask_BP: the caller's 2-D mask of those columns.
        last_vision: column of the last token that a stage may drop (a tensor, so that nobody waits for it); None in a
            batch of several samples.
        rope_deltas: what an M-RoPE model would add to the positions of later text. Transformers keeps it on the model,
            where another request overwrites it.
        counted: the layer whose columns the cache counts.
    """

    length: int
    cuts: tuple[Cut, ...] = ()
    mask_BP: Tensor | None = None
    last_vision: Tensor | None = None
    rope_deltas: Tensor | None = None
    counted: int = 0

    @property
    def dropped(self) -> int:
        """Columns that the counted layer holds less than the conversation has."""
        return self.length - self.held(self.counted)

    def at_input(self) -> Cut | None:
        """The cut before the language model, if there was one."""
        return next((cut for cut in self.cuts if cut.layer == 0), None)

    def at_layer(self, layer: int) -> Cut | None:
        """The last cut inside the language model that a layer stands behind."""
        return next((cut for cut in reversed(self.cuts) if 0 < cut.layer <= layer), None)

    def held(self, layer: int) -> int:
        """Columns of the conversation that a layer holds."""
        cut = self.at_layer(layer) or self.at_input()
        return self.length if cut is None else cut.width

    def before(self, layer: int, device: torch.device) -> Cut:
        """What a layer holds, as a cut, whether or not there was one."""
        cut = self.at_layer(layer) if layer else self.at_input()
        if cut is not None:
            return cut
        entry, nothing = self.at_input(), torch.zeros(1, 1, dtype=torch.long, device=device)
        if entry is not None:
            return replace(entry, lost_B1=nothing)
        return Cut(layer, self.length, self.mask_BP, True, nothing)

    @property
    def weighs(self) -> bool:
        """Whether some column stands for several tokens."""
        return any(cut.log_size_BN is not None for cut in self.cuts)

    def grown(self, steps: int, new_BQ: Tensor | None) -> Prefix:
        """The same request after `steps` more columns."""
        cuts = tuple(cut.grown(steps, new_BQ) for cut in self.cuts)
        mask_BP = join(self.mask_BP, self.length, new_BQ, steps)
        return replace(self, length=self.length + steps, cuts=cuts, mask_BP=mask_BP)

    def cropped(self, steps: int) -> Prefix:
        """The same request without its last columns, which every layer held."""
        cuts = tuple(cut.cropped(steps) for cut in self.cuts)
        mask_BP = None if self.mask_BP is None else self.mask_BP[:, :-steps]
        return replace(self, length=self.length - steps, cuts=cuts, mask_BP=mask_BP)


@dataclass
class Call:
    """State of one forward call. It lives exactly as long as the call.

    Attributes:
        labels_BS: the caller's labels.
        mask_BS: the caller's 2-D mask over the call's columns (prefill).
        places: by modality, where placeholders stand (prefill).
        encoded: by modality, what is known of the features that fill them.
        rows, frame: vision tokens and sequence at hand; None in a call without images.
        last_vision: position of the last vision token; None in a batch of several samples.
        last_prompt_B: original position of the last prompt token.
        blocks_BS: numbers of blocks that attend both ways; None if there are none.
        prefix: the conversation before this call; None if there was nothing, or nothing of ours in it.
        new_BQ: 2-D mask of everything after the prefix (decode); None if all of it and of the prefix is real.
        custom_mask: a caller's 4-D mask over the language model's input.
        positions: position ids of the language model's input, as it got them.
        real_BN: False on padding among those columns; None if there is none.
        layer_positions: position ids of the columns at hand inside the language model.
        cuts: what this call leaves for later ones.
        before: input of the layer before the next stage, if that stage reads keys or attention.
        behind: input that the layer behind the next stage would have without it, if that stage reads its attention.
        entry: vision tokens, sequence and hidden states at the language model's input, if some stage reads them.
        gates: what layers from the last stage on multiply and add; None if nothing.
        memo: shortened arguments, by what they are and for which kind of layer: layers of a kind share them. (Also
            because a layer that reuses another's keys asks when those are already in the cache.)
    """

    labels_BS: Tensor | None = None
    mask_BS: Tensor | None = None
    places: Mapping[str, Tensor] = field(default_factory=dict)
    encoded: dict[str, Encoded] = field(default_factory=dict)
    rows: Rows | None = None
    frame: Frame | None = None
    last_vision: Tensor | None = None
    last_prompt_B: Tensor | None = None
    blocks_BS: Tensor | None = None
    prefix: Prefix | None = None
    new_BQ: Tensor | None = None
    custom_mask: Tensor | None = None
    positions: Tensor | None = None
    real_BN: Tensor | None = None
    layer_positions: Tensor | None = None
    cuts: list[Cut] = field(default_factory=list)
    before: LayerInput | None = None
    behind: LayerInput | None = None
    entry: tuple[Rows, Frame, Tensor] | None = None
    gates: Gates | None = None
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def is_prefill(self) -> bool:
        """Whether the call brings images."""
        return bool(self.places)

    @property
    def weighs(self) -> bool:
        """Whether some column, of this call or of the conversation before it, stands for several tokens."""
        new = self.frame is not None and self.frame.log_size_BN is not None
        return new or (self.prefix is not None and self.prefix.weighs)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed once for all layers that share it."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def end(self, counted: int, rope_deltas: Tensor | None = None) -> Prefix:
        """What the request's cache must carry after this prefill; `counted` is the layer whose columns it counts."""
        assert self.frame is not None
        before = self.prefix or Prefix(0)
        cuts = {cut.layer: cut for cut in before.cuts}
        for cut in self.cuts:
            cuts[cut.layer] = cut.after(before.before(cut.layer, cut.lost_B1.device))
        return Prefix(
            length=before.length + self.frame.length,
            cuts=tuple(cuts[layer] for layer in sorted(cuts)),
            mask_BP=join(before.mask_BP, before.length, self.mask_BS, self.frame.length),
            last_vision=None if self.last_vision is None else before.length + self.last_vision,
            rope_deltas=rope_deltas,
            counted=counted,
        )


def join(old_BN: Tensor | None, width: int, new_BQ: Tensor | None, steps: int) -> Tensor | None:
    """Two neighbouring 2-D masks as one bool (B, N + Q); None if both are all True.

    Args:
        old_BN: the left one, None if all True.
        width: N.
        new_BQ: the right one, None if all True.
        steps: Q.
    """
    given = old_BN if new_BQ is None else new_BQ
    if given is None:
        return None
    old_BN = given.new_ones(len(given), width, dtype=torch.bool) if old_BN is None else old_BN.bool()
    new_BQ = given.new_ones(len(given), steps, dtype=torch.bool) if new_BQ is None else new_BQ.bool()
    return torch.cat([old_BN, new_BQ], 1)


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


def num_steps(kwargs: Mapping[str, Any]) -> int:
    """New columns of a call."""
    ids = kwargs.get("input_ids")
    given: Tensor = kwargs["inputs_embeds"] if ids is None else ids
    return given.shape[1]


@functools.cache
def parameters_of(forward: Any) -> tuple[str, ...]:
    """Parameters of a method but for its `self`; asked at every layer of every step."""
    return tuple(inspect.signature(forward).parameters)[1:]
