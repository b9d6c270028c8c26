"""The vision tokens that are left and the sequence after a stage; the only file that shortens sequences.

B samples, S positions of the original sequence, N columns of the sequence at hand, R budget rows (one per image or
per prompt), V vision tokens of a row (padded), D hidden size. Counts are known on the host, so only `Frame.full` for a
batch of several samples syncs, once per prefill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpcompress.families import Layout
from tpcompress.insertion.shorten.columns import to_device_async

PER_COLUMN = ("index_BN", "base_BN", "place_BN", "log_size_BN", "value_gate_BN", "key_bias_BN")
"""Fields of a `Frame` that are gathered with its columns."""


@dataclass(frozen=True)
class BudgetRows:
    """The vision tokens in the sequence at hand, one row per budget.

    Attributes:
        owner: sample of each row.
        total: tokens that the projector produced for each row.
        count: tokens that each row has left.
        layouts: layouts of the images or videos of each row; one, except under `scope: prompt`.
        num_images: images and videos, whatever the scope.
        owner_R: `owner` on the device.
        index_RV: position of each token in the original sequence.
        token_RV: index of each token in its row, 0 .. total - 1.
        valid_RV: False where a shorter row is padded.
        table_RV4: canvas row, canvas column, rectangle (tile or frame) and image of each token, counted in its row.
        canvas: (rows, columns) that hold the stacked rectangles of every row.
    """

    owner: list[int]
    total: list[int]
    count: list[int]
    layouts: list[tuple[Layout, ...]]
    num_images: int
    owner_R: Tensor
    index_RV: Tensor
    token_RV: Tensor
    valid_RV: Tensor
    table_RV4: Tensor
    canvas: tuple[int, int]

    @property
    def ragged(self) -> bool:
        """Whether some row is padded."""
        return len(set(self.count)) > 1

    def retain(self, keep_RV: Tensor, count: list[int]) -> BudgetRows:
        """The rows after a stage kept `count` tokens of each."""
        order_RK = (~keep_RV).to(torch.int8).argsort(dim=1, stable=True)[:, : max(count)]
        return replace(
            self,
            count=count,
            index_RV=self.index_RV.gather(1, order_RK),
            token_RV=self.token_RV.gather(1, order_RK),
            valid_RV=keep_RV.gather(1, order_RK),
            table_RV4=self.table_RV4.gather(1, order_RK[..., None].expand(-1, -1, 4)),
        )

    def with_dummies(self) -> BudgetRows:
        """The same rows with one dummy token in every empty row, so that pruners need not handle V = 0.

        The selection of a dummy is discarded.
        """
        if all(self.count):
            return self
        empty_R = to_device_async(torch.tensor([not count for count in self.count]), self.valid_RV.device)
        first_V = torch.arange(self.valid_RV.shape[1], device=self.valid_RV.device) == 0
        return replace(self, valid_RV=self.valid_RV | (empty_R[:, None] & first_V))

    def retained_RV(self) -> Tensor:
        """bool (R, largest total): which of its original tokens each row still has."""
        kept_RV = torch.zeros(len(self.total), max(self.total) + 1, dtype=torch.bool, device=self.index_RV.device)
        return kept_RV.scatter_(1, self.token_RV.masked_fill(~self.valid_RV, max(self.total)), True)[:, :-1]


@dataclass(frozen=True)
class Frame:
    """The sequence after some stages: the original position of each column, and what columns carry.

    Attributes:
        length: S, columns of the original sequence.
        index_BN: original position of each column.
        base_BN: column of the language model's input that each column was.
        present_BN: False on padding, fillers (ragged batch) and hidden tokens (mode `mask`); None if all are present.
        lengths: present columns of each sample.
        shift_BN: tokens dropped before each column since the language model's input, for compact positions.
        lost: tokens dropped from each sample since the language model's input.
        place_BN: column of the language model's input whose position each column takes; None if each takes its own.
        log_size_BN: fp32, logarithm of the number of tokens that each column stands for; None if all stand for one.
        value_gate_BN: fp32, multiplies the values of each column in every layer; None if all are 1.
        key_bias_BN: fp32, is added to the attention logits of each column's key; None if all are 0.
    """

    length: int
    index_BN: Tensor
    base_BN: Tensor
    present_BN: Tensor | None
    lengths: list[int]
    shift_BN: Tensor
    lost: list[int]
    place_BN: Tensor | None = None
    log_size_BN: Tensor | None = None
    value_gate_BN: Tensor | None = None
    key_bias_BN: Tensor | None = None

    @classmethod
    def full(cls, B: int, S: int, device: torch.device, mask_BS: Tensor | None = None) -> Frame:
        """The untouched sequence.

        Args:
            B, S, device: shape and device.
            mask_BS: the caller's 2-D mask. In a batch of several samples its padding is cut, too, so that a short
                sample without images does not keep the others long.
        """
        index_BS = torch.arange(S, device=device).expand(B, S)
        lengths = [S] * B if B == 1 or mask_BS is None else mask_BS.bool().sum(1).cpu().numpy().tolist()
        present_BS = None if min(lengths) == S or mask_BS is None else mask_BS.bool()
        return cls(S, index_BS, index_BS, present_BS, lengths, torch.zeros_like(index_BS), [0] * B)

    @property
    def width(self) -> int:
        """N, columns of the sequence at hand."""
        return self.index_BN.shape[1]

    @property
    def positioned_BN(self) -> Tensor:
        """Column of the language model's input whose position each column takes."""
        return self.base_BN if self.place_BN is None else self.place_BN

    def as_input(self) -> Frame:
        """The same columns as the language model's input."""
        base_BN, nothing = (
            torch.arange(self.width, device=self.index_BN.device).expand_as(self.index_BN),
            [0] * len(self.lost),
        )
        return replace(self, base_BN=base_BN, shift_BN=torch.zeros_like(self.shift_BN), lost=nothing, place_BN=None)

    def calibrated(self, rows: BudgetRows, size_RV: Tensor | None, place_RV: Tensor | None) -> Frame:
        """The same columns after vision tokens took sizes and places; those of dropped tokens do not matter.

        Args:
            rows: the vision tokens at hand.
            size_RV: number of the tokens at hand that each stands for, multiplied by earlier sizes; None for 1.
            place_RV: index in the row of the token at hand whose position each takes; None for its own.
        """
        if size_RV is None and place_RV is None:
            return self
        B, N = self.index_BN.shape
        log_size_BN, place_BN = self.log_size_BN, self.place_BN
        if size_RV is not None:
            added_BN = self._spread(rows, size_RV.to(self.index_BN.device, torch.float32).log(), 0.0)
            log_size_BN = added_BN if log_size_BN is None else log_size_BN + added_BN
        if place_RV is not None:
            cell_RV = self.cells(rows)
            into_T = cell_RV.masked_fill(~rows.valid_RV, B * N).reshape(-1)
            flat_M = self.positioned_BN.reshape(-1)
            from_T = cell_RV.gather(1, place_RV.clamp(0, cell_RV.shape[1] - 1)).reshape(-1)
            taken_M = torch.cat([flat_M, flat_M.new_zeros(1)]).scatter(0, into_T, flat_M[from_T])
            place_BN = taken_M[:-1].view(B, N)
        return replace(self, place_BN=place_BN, log_size_BN=log_size_BN)

    def gated(self, rows: BudgetRows, value_gate_RV: Tensor | None, key_bias_RV: Tensor | None) -> Frame:
        """The same columns after vision tokens took gates; gates of several stages multiply, their biases add.

        Args:
            rows: the vision tokens at hand.
            value_gate_RV: factor of the values of each; None for 1.
            key_bias_RV: summand of the attention logits of each key; None for 0.
        """
        gate_BN, bias_BN = self.value_gate_BN, self.key_bias_BN
        if value_gate_RV is not None:
            new_BN = self._spread(rows, value_gate_RV, 1.0)
            gate_BN = new_BN if gate_BN is None else gate_BN * new_BN
        if key_bias_RV is not None:
            new_BN = self._spread(rows, key_bias_RV, 0.0)
            bias_BN = new_BN if bias_BN is None else bias_BN + new_BN
        return replace(self, value_gate_BN=gate_BN, key_bias_BN=bias_BN)

    def _spread(self, rows: BudgetRows, value_RV: Tensor, other: float) -> Tensor:
        """Values of vision tokens at their columns (B, N), fp32 or wider, differentiable; `other` elsewhere."""
        B, N = self.index_BN.shape
        into_T = self.cells(rows).masked_fill(~rows.valid_RV, B * N).reshape(-1)
        value_T = value_RV.to(torch.promote_types(value_RV.dtype, torch.float32)).reshape(-1)
        return value_T.new_full((B * N + 1,), other).scatter(0, into_T, value_T)[:-1].view(B, N)

    def column_of(self, index_BK: Tensor) -> Tensor:
        """Column (B, K) of original positions (B, K); arbitrary for positions that were dropped."""
        column_BN = torch.arange(self.width, device=self.index_BN.device).expand_as(self.index_BN)
        slot_BS = self.index_BN.new_zeros(self.index_BN.shape[0], self.length).scatter(1, self.index_BN, column_BN)
        return slot_BS.gather(1, index_BK)

    def cells(self, rows: BudgetRows) -> Tensor:
        """Flat index (R, V) of each row's tokens into the B * N columns."""
        all_BS = torch.arange(self.length, device=self.index_BN.device).expand(self.index_BN.shape[0], -1)
        slot_BS = self.column_of(all_BS)
        return rows.owner_R[:, None] * self.width + slot_BS[rows.owner_R[:, None], rows.index_RV]

    def cut(self, rows: BudgetRows, keep_RV: Tensor, count: list[int], hide: bool) -> tuple[Frame, Tensor | None]:
        """Drop the tokens that a stage does not keep.

        Retained columns keep their order and are aligned right: the last token stays last, which `generate` reads.
        Shorter samples get fillers on the left.

        Args:
            rows: the vision tokens before the stage.
            keep_RV: the pruner's selection.
            count: number of tokens that each row keeps.
            hide: leave every column in place and only mark it absent (mode `mask`).

        Returns:
            The new frame, and the old column of each new one (B, N'), or None if columns stay.

        Raises:
            ValueError: no column is left.
        """
        B, N = self.index_BN.shape
        trash_RV = self.cells(rows).masked_fill(~rows.valid_RV, B * N)
        drop_BN = keep_RV.new_zeros(B * N + 1).scatter(0, trash_RV.reshape(-1), ~keep_RV.reshape(-1))[:-1].view(B, N)
        keep_BN = ~drop_BN if self.present_BN is None else self.present_BN & ~drop_BN
        shift_BN = self.shift_BN + drop_BN.cumsum(1)
        lengths, lost = list(self.lengths), list(self.lost)
        for owner, before, after in zip(rows.owner, rows.count, count, strict=True):
            lengths[owner] -= before - after
            lost[owner] += before - after
        if hide:
            return replace(self, present_BN=keep_BN, lengths=lengths, shift_BN=shift_BN, lost=lost), None
        if not max(lengths):
            raise ValueError("This sequence has only vision tokens, and none of them is kept; add words to the prompt.")
        local_BN = keep_BN.to(torch.int8).argsort(dim=1, stable=True)[:, -max(lengths) :]
        per_column: dict[str, Any] = {
            name: None if (x := getattr(self, name)) is None else x.gather(1, local_BN) for name in PER_COLUMN
        }
        frame = replace(
            self,
            **per_column,
            present_BN=None if len(set(lengths)) == 1 else keep_BN.gather(1, local_BN),
            lengths=lengths,
            shift_BN=shift_BN.gather(1, local_BN),
            lost=lost,
        )
        return frame, local_BN

    def padding(self, mask_BS: Tensor | None) -> Tensor | None:
        """The 2-D mask of the columns: the caller's mask and presence together, bool (B, N); None if all True."""
        real_BN = None if mask_BS is None else mask_BS.bool().gather(1, self.index_BN)
        if real_BN is None or self.present_BN is None:
            return self.present_BN if real_BN is None else real_BN
        return real_BN & self.present_BN

    def labels(self, labels_BS: Tensor) -> Tensor:
        """Labels of the columns, -100 on absent ones."""
        labels_BN = labels_BS.gather(1, self.index_BN)
        return labels_BN if self.present_BN is None else labels_BN.masked_fill(~self.present_BN, -100)
