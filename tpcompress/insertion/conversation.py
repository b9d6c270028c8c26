"""What a KV cache carries about its pruned conversation, so that later calls build masks and positions from it.

B samples, P columns of the conversation so far, N columns that a layer holds, Q new columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpcompress.insertion.shorten.sequence import Frame
from tpcompress.insertion.shorten.sizes import concat_log_sizes


@dataclass(frozen=True)
class StageCut:
    """What later calls need of one stage.

    Attributes:
        layer: first layer with the shortened cache.
        width: N, columns of the conversation that these layers hold.
        padding_BN: True on real columns; None if all are real.
        whole: no column is a filler or hidden, so `padding_BN` holds only the caller's own padding.
        num_dropped_B1: positions that each sample lost since the language model's input, which compact positions
            subtract.
        log_size_BN: fp32, logarithm of the number of tokens that each column stands for; None if all stand for one.
    """

    layer: int
    width: int
    padding_BN: Tensor | None
    whole: bool
    num_dropped_B1: Tensor
    log_size_BN: Tensor | None = None

    @classmethod
    def of(cls, layer: int, frame: Frame, padding_BN: Tensor | None, num_dropped_B1: Tensor) -> StageCut:
        """The cut that resulted in a frame."""
        return cls(layer, frame.width, padding_BN, frame.present_BN is None, num_dropped_B1, frame.log_size_BN)

    def padding(self, new_BQ: Tensor | None) -> Tensor | None:
        """2-D mask of these columns and of later ones, bool (B, N + Q); None if all are real."""
        return None if new_BQ is None else join(self.padding_BN, self.width, new_BQ, new_BQ.shape[1])

    def after(self, before: StageCut) -> StageCut:
        """This cut of a later call, appended to what its layers held before."""
        return StageCut(
            self.layer,
            before.width + self.width,
            join(before.padding_BN, before.width, self.padding_BN, self.width),
            before.whole and self.whole,
            self.num_dropped_B1 + before.num_dropped_B1,
            concat_log_sizes(before.log_size_BN, before.width, self.log_size_BN, self.width),
        )

    def grown(self, steps: int, new_BQ: Tensor | None) -> StageCut:
        """This cut after `steps` more columns, whose 2-D mask is `new_BQ`."""
        padding_BN = join(self.padding_BN, self.width, new_BQ, steps)
        log_size_BN = concat_log_sizes(self.log_size_BN, self.width, None, steps)
        return replace(self, width=self.width + steps, padding_BN=padding_BN, log_size_BN=log_size_BN)

    def cropped(self, steps: int) -> StageCut:
        """This cut without its last `steps` columns."""
        padding_BN, log_size_BN = (None if x is None else x[:, :-steps] for x in (self.padding_BN, self.log_size_BN))
        return replace(self, width=self.width - steps, padding_BN=padding_BN, log_size_BN=log_size_BN)


@dataclass(frozen=True)
class CachedPrefix:
    """The conversation that a KV cache holds.

    Attributes:
        length: P, columns of the conversation after the last prompt with images.
        cuts: stages that acted in it, at rising layers.
        mask_BP: the caller's 2-D mask of those columns.
        last_vision: column of the last token that a stage may drop, as a tensor (no host-device sync); None in a batch
            of several samples.
        rope_deltas: offset that an M-RoPE model adds to the positions of later text. Transformers keeps it on the
            model, where another request overwrites it.
        counted: layer whose columns `cache.get_seq_length()` counts.
    """

    length: int
    cuts: tuple[StageCut, ...] = ()
    mask_BP: Tensor | None = None
    last_vision: Tensor | None = None
    rope_deltas: Tensor | None = None
    counted: int = 0

    @property
    def dropped(self) -> int:
        """Columns of the conversation that the counted layer does not hold."""
        return self.length - self.held(self.counted)

    def at_input(self) -> StageCut | None:
        """The cut before the language model, if there was one."""
        return next((cut for cut in self.cuts if cut.layer == 0), None)

    def at_layer(self, layer: int) -> StageCut | None:
        """The last cut inside the language model at or before a layer, if there was one."""
        return next((cut for cut in reversed(self.cuts) if 0 < cut.layer <= layer), None)

    def held(self, layer: int) -> int:
        """Columns of the conversation that a layer holds."""
        cut = self.at_layer(layer) or self.at_input()
        return self.length if cut is None else cut.width

    def before(self, layer: int, device: torch.device) -> StageCut:
        """What a layer holds, as a cut; if nothing was cut, one that keeps every column."""
        cut = self.at_layer(layer) if layer else self.at_input()
        if cut is not None:
            return cut
        entry, nothing = self.at_input(), torch.zeros(1, 1, dtype=torch.long, device=device)
        if entry is not None:
            return replace(entry, num_dropped_B1=nothing)
        return StageCut(layer, self.length, self.mask_BP, True, nothing)

    @property
    def has_sizes(self) -> bool:
        """Whether a column stands for several tokens."""
        return any(cut.log_size_BN is not None for cut in self.cuts)

    def grown(self, steps: int, new_BQ: Tensor | None) -> CachedPrefix:
        """The same conversation after `steps` more columns."""
        cuts = tuple(cut.grown(steps, new_BQ) for cut in self.cuts)
        mask_BP = join(self.mask_BP, self.length, new_BQ, steps)
        return replace(self, length=self.length + steps, cuts=cuts, mask_BP=mask_BP)

    def cropped(self, steps: int) -> CachedPrefix:
        """The same conversation without its last `steps` columns, which every layer held."""
        cuts = tuple(cut.cropped(steps) for cut in self.cuts)
        mask_BP = None if self.mask_BP is None else self.mask_BP[:, :-steps]
        return replace(self, length=self.length - steps, cuts=cuts, mask_BP=mask_BP)


def join(old_BN: Tensor | None, width: int, new_BQ: Tensor | None, steps: int) -> Tensor | None:
    """Two neighbouring 2-D masks as one, bool (B, N + Q); None if both are all True.

    Args:
        old_BN: left mask; None if all True.
        width: N.
        new_BQ: right mask; None if all True.
        steps: Q.
    """
    given = old_BN if new_BQ is None else new_BQ
    if given is None:
        return None
    old_BN = given.new_ones(len(given), width, dtype=torch.bool) if old_BN is None else old_BN.bool()
    new_BQ = given.new_ones(len(given), steps, dtype=torch.bool) if new_BQ is None else new_BQ.bool()
    return torch.cat([old_BN, new_BQ], 1)
