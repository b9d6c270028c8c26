"""State of one forward call of an attached model.

B samples, S columns of a call, N columns at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.conversation import CachedPrefix, StageCut, join
from tpcompress.insertion.encoded import Encoded
from tpcompress.insertion.gates import Gates
from tpcompress.insertion.layer_probe import LayerProbe
from tpcompress.insertion.settings import Settings
from tpcompress.insertion.shorten.sequence import BudgetRows, Frame


@dataclass
class Call:
    """State of one forward call. It ends with the call.

    Attributes:
        settings: mode, budgets and layers under which the call runs.
        labels_BS: the caller's labels.
        mask_BS: the caller's 2-D mask over the call's columns (prefill).
        places: by modality, where placeholders stand (prefill).
        tokens: ids (B, S) or embeddings (B, S, D) of the call, if they tell which tiles are of one image (prefill).
        encoded: by modality, what is known of the features that fill them.
        rows, frame: vision tokens and sequence at hand; None in a call without images.
        last_vision: position of the last vision token; None in a batch of several samples.
        last_prompt_B: original position of the last prompt token.
        blocks_BS: block ids of columns that attend bidirectionally; None without such blocks.
        prefix: the conversation in the cache before this call; None if the cache was empty or never pruned.
        new_BQ: 2-D mask of everything after the prefix (decode); None if all columns, old and new, are real.
        custom_mask: the caller's 4-D mask over the language model's input.
        positions: position ids of the language model's input.
        real_BN: False on padding among those columns; None without padding.
        layer_positions: position ids of the columns at hand inside the language model.
        cuts: cuts of this call, which later calls need.
        before: input of the layer before the next stage, if that stage reads its keys, values or attention.
        ahead: input that the layer after the next stage would get without the cut, if that stage reads its attention.
        entry: vision tokens, sequence and hidden states at the language model's input, if a stage reads them.
        gates: gates for the layers after the last stage; None without.
        memo: layer arguments by kind of layer, computed once and shared by the layers of that kind. (A layer that
            reuses another layer's keys reads its arguments after these keys have entered the cache.)
    """

    settings: Settings
    labels_BS: Tensor | None = None
    mask_BS: Tensor | None = None
    places: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    rows: BudgetRows | None = None
    frame: Frame | None = None
    last_vision: Tensor | None = None
    last_prompt_B: Tensor | None = None
    blocks_BS: Tensor | None = None
    prefix: CachedPrefix | None = None
    new_BQ: Tensor | None = None
    custom_mask: Tensor | None = None
    positions: Tensor | None = None
    real_BN: Tensor | None = None
    layer_positions: Tensor | None = None
    cuts: list[StageCut] = field(default_factory=list)
    before: LayerProbe | None = None
    ahead: LayerProbe | None = None
    entry: tuple[BudgetRows, Frame, Tensor] | None = None
    gates: Gates | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_prefill(self) -> bool:
        """Whether the call brings images."""
        return bool(self.places)

    @property
    def has_sizes(self) -> bool:
        """Whether a column, of this call or of the conversation before it, stands for several tokens."""
        new = self.frame is not None and self.frame.log_size_BN is not None
        return new or (self.prefix is not None and self.prefix.has_sizes)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `make`, computed once per key and call."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def end(self, counted: int, rope_deltas: Tensor | None = None) -> CachedPrefix:
        """What the cache must carry after this prefill.

        Args:
            counted: layer whose columns `cache.get_seq_length()` counts.
            rope_deltas: offset of later text positions in an M-RoPE model.
        """
        assert self.frame is not None
        before = self.prefix or CachedPrefix(0)
        cuts = {cut.layer: cut for cut in before.cuts}
        for cut in self.cuts:
            cuts[cut.layer] = cut.after(before.before(cut.layer, cut.num_dropped_B1.device))
        return CachedPrefix(
            length=before.length + self.frame.length,
            cuts=tuple(cuts[layer] for layer in sorted(cuts)),
            mask_BP=join(before.mask_BP, before.length, self.mask_BS, self.frame.length),
            last_vision=None if self.last_vision is None else before.length + self.last_vision,
            rope_deltas=rope_deltas,
            counted=counted,
        )


def last_prompt_token(labels_BS: Tensor | None, mask_BS: Tensor | None, B: int, S: int, device: torch.device) -> Tensor:
    """Position (B,) of the token before the first label, or of the last real token without labels."""
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
