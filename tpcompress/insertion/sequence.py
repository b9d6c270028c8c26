"""THE file that shortens: where vision tokens are in the sequence, and what is left of it after a stage.

B samples, S positions of the original sequence, N columns of the sequence at hand, R budget rows (one per image or
per prompt), V vision tokens of a row (padded), D hidden size. Counts live on the host, so nothing here waits for a GPU
except `locate` and `Frame.full` for a batch of several samples (once per prefill).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from tpcompress.families import Layout


@dataclass(frozen=True)
class Rows:
    """The vision tokens still in the sequence, one row per budget.

    Attributes:
        owner: sample of each row.
        total: tokens that the projector produced for each row.
        count: tokens of each row that are still there.
        layouts: the images or videos of each row; one, except under the scope of a prompt.
        owner_R: `owner` on the device.
        index_RV: position of each token in the original sequence.
        token_RV: number of each token within its row, 0 .. total - 1.
        valid_RV: False where a shorter row is padded.
        table_RV4: canvas row, canvas column, rectangle (tile or frame) and image of each token, counted in its row.
        canvas: (rows, columns) that hold every row's rectangles standing on top of each other.
    """

    owner: list[int]
    total: list[int]
    count: list[int]
    layouts: list[tuple[Layout, ...]]
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

    def retain(self, keep_RV: Tensor, count: list[int]) -> Rows:
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

    def retained_RV(self) -> Tensor:
        """bool (R, largest total): which of its original tokens each row still has."""
        kept_RV = torch.zeros(len(self.total), max(self.total) + 1, dtype=torch.bool, device=self.index_RV.device)
        return kept_RV.scatter_(1, self.token_RV.masked_fill(~self.valid_RV, max(self.total)), True)[:, :-1]


@dataclass(frozen=True)
class _Run:
    """Placeholders of one image, or of adjacent tiles of one, in the list of all placeholders of a call."""

    owner: int
    start: int
    layout: Layout


def locate(
    places: Mapping[str, Tensor],
    layouts: Mapping[str, Sequence[Layout]],
    scope: str,
    joins_tiles: bool = False,
    splits_tiles: bool = False,
) -> Rows:
    """Find the vision tokens of every image and video.

    Args:
        places: by modality, bool (B, S): True where the sequence holds a placeholder.
        layouts: by modality, how the placeholders of each image or video lie, in their order.
        scope: `image` for one row per image or video, `prompt` for one row per sample.
        joins_tiles: layouts whose placeholders follow each other without a gap are tiles of one image.
        splits_tiles: every rectangle of a layout is an image of its own.

    Transformers has found before that their numbers fit.
    """
    B, S = next(iter(places.values())).shape
    runs: list[_Run] = []
    found, first = [], 0
    for modality, given in layouts.items():
        listed = [layout for layout in given if layout.count]  # a sample without images may have features of no token
        if splits_tiles:
            listed = [replace(layout, grids=(grid,)) for layout in listed for grid in layout.grids]
        # A stable sort instead of `nonzero`: the number of placeholders is known, so the host need not ask for it.
        length = sum(layout.placeholders for layout in listed)
        place_T = (~places[modality].reshape(-1)).to(torch.int8).argsort(stable=True)[:length]
        runs += [replace(run, start=run.start + first) for run in _runs(place_T, listed, B, S, joins_tiles)]
        found.append(place_T)
        first += length
    place_T, device = torch.cat(found), found[0].device
    groups = [[run] for run in runs]
    if scope == "prompt":
        groups = [[run for run in runs if run.owner == sample] for sample in dict.fromkeys(run.owner for run in runs)]
    tables = [_table(group) for group in groups]
    total_R = [len(table) for table in tables]
    # One tensor and one copy to the device: everything that is known of the tokens beforehand.
    table_RV5 = sent(torch.nn.utils.rnn.pad_sequence(tables, batch_first=True), device)
    token_V = torch.arange(max(total_R), device=device)
    count_R1 = sent(torch.tensor(total_R), device)[:, None]
    token_RV = token_V.minimum(count_R1 - 1)
    table_RV5 = table_RV5.gather(1, token_RV[..., None].expand_as(table_RV5))
    index_RV, table_RV4 = place_T[table_RV5[..., 0]] % S, table_RV5[..., 1:]
    if scope == "prompt" and len(layouts) > 1:  # images and videos were listed apart; their rows follow the sequence
        order_RV = index_RV.masked_fill(token_V >= count_R1, S).argsort(dim=1, stable=True)
        index_RV, table_RV4 = (
            index_RV.gather(1, order_RV),
            table_RV4.gather(1, order_RV[..., None].expand_as(table_RV4)),
        )
    canvases = [[sum(run.layout.canvas[0] for run in group) for group in groups]]
    canvases.append([max(run.layout.canvas[1] for run in group) for group in groups])
    return Rows(
        owner=[group[0].owner for group in groups],
        total=total_R,
        count=total_R,
        layouts=[tuple(run.layout for run in group) for group in groups],
        owner_R=sent(torch.tensor([group[0].owner for group in groups]), device),
        index_RV=index_RV,
        token_RV=token_RV,
        valid_RV=token_V < count_R1,
        table_RV4=table_RV4,
        canvas=(max(canvases[0]), max(canvases[1])),
    )


def _runs(place_T: Tensor, layouts: Sequence[Layout], B: int, S: int, joins_tiles: bool) -> list[_Run]:
    """Whose each layout is; the host reads positions only where shapes do not tell (B > 1, tiles to join)."""
    ends = list(accumulate(layout.placeholders for layout in layouts))
    starts = [0, *ends[:-1]]
    joins = joins_tiles and len(layouts) > 1
    edge_2R = [[0] * len(starts)] * 2
    if B > 1 or joins:
        edge_2R = (
            place_T[sent(torch.tensor([starts, [end - 1 for end in ends]]), place_T.device)].cpu().numpy().tolist()
        )
    runs: list[_Run] = []
    previous = -1
    for begin, last, start, layout in zip(*edge_2R, starts, layouts, strict=True):
        if joins and runs and begin == previous + 1 and begin % S:
            whole = replace(layout, grids=runs[-1].layout.grids + layout.grids)
            runs[-1] = replace(runs[-1], layout=whole)
        else:
            runs.append(_Run(begin // S, start, layout))
        previous = last
    return runs


def _table(group: Sequence[_Run]) -> Tensor:
    """(V, 5): place in the list of placeholders, canvas row and column, rectangle, image; several images stack up."""
    parts, top, tiles = [], 0, 0
    for number, run in enumerate(group):
        offset = torch.tensor([run.start, top, 0, tiles])
        table = run.layout.table + offset
        parts.append(torch.cat([table, torch.full((len(table), 1), number)], 1))
        top, tiles = top + run.layout.canvas[0], tiles + len(run.layout.grids)
    return torch.cat(parts)


@dataclass(frozen=True)
class Frame:
    """The sequence after some stages: which original position each column is.

    Attributes:
        length: S, columns of the original sequence.
        index_BN: original position of each column.
        base_BN: column of the language model's input that each column was.
        present_BN: False on padding, fillers (ragged batch) and hidden tokens (mode `mask`); None if all are present.
        lengths: present columns of each sample.
        shift_BN: tokens dropped before each column since the language model's input, for compact positions.
        lost: tokens dropped from each sample since the language model's input.
    """

    length: int
    index_BN: Tensor
    base_BN: Tensor
    present_BN: Tensor | None
    lengths: list[int]
    shift_BN: Tensor
    lost: list[int]

    @classmethod
    def full(cls, B: int, S: int, device: torch.device, mask_BS: Tensor | None = None) -> Frame:
        """The untouched sequence.

        Args:
            B, S, device: its shape and place.
            mask_BS: the caller's 2-D mask. In a batch of several samples its padding makes room, too: a short sample
                without images must not keep the others long.
        """
        index_BS = torch.arange(S, device=device).expand(B, S)
        lengths = [S] * B if B == 1 or mask_BS is None else mask_BS.bool().sum(1).cpu().numpy().tolist()
        present_BS = None if min(lengths) == S or mask_BS is None else mask_BS.bool()
        return cls(S, index_BS, index_BS, present_BS, lengths, torch.zeros_like(index_BS), [0] * B)

    @property
    def width(self) -> int:
        """N, columns of the sequence at hand."""
        return self.index_BN.shape[1]

    def as_input(self) -> Frame:
        """The same columns, now counted as the language model's input."""
        base_BN = torch.arange(self.width, device=self.index_BN.device).expand_as(self.index_BN)
        return replace(self, base_BN=base_BN, shift_BN=torch.zeros_like(self.shift_BN), lost=[0] * len(self.lost))

    def column_of(self, index_BK: Tensor) -> Tensor:
        """Column (B, K) at which original positions (B, K) now stand; meaningless for positions that were dropped."""
        column_BN = torch.arange(self.width, device=self.index_BN.device).expand_as(self.index_BN)
        slot_BS = self.index_BN.new_zeros(self.index_BN.shape[0], self.length).scatter(1, self.index_BN, column_BN)
        return slot_BS.gather(1, index_BK)

    def cells(self, rows: Rows) -> Tensor:
        """Flat index (R, V) of each row's tokens into the B * N columns."""
        all_BS = torch.arange(self.length, device=self.index_BN.device).expand(self.index_BN.shape[0], -1)
        slot_BS = self.column_of(all_BS)
        return rows.owner_R[:, None] * self.width + slot_BS[rows.owner_R[:, None], rows.index_RV]

    def cut(self, rows: Rows, keep_RV: Tensor, count: list[int], hide: bool) -> tuple[Frame, Tensor | None]:
        """Take dropped tokens out.

        Args:
            rows: the vision tokens before the stage.
            keep_RV: the pruner's choice.
            count: how many each row keeps.
            hide: leave every column where it is and only mark it absent (mode `mask`).

        Returns:
            The new frame, and the old column of each new one (B, N'), or None if columns stay. Retained columns keep
            their order and stand at the right: the last token stays last, which `generate` reads. Shorter samples are
            filled on the left.
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
        local_BN = keep_BN.to(torch.int8).argsort(dim=1, stable=True)[:, -max(lengths) :]
        present_BN = None if len(set(lengths)) == 1 else keep_BN.gather(1, local_BN)
        frame = Frame(
            self.length,
            self.index_BN.gather(1, local_BN),
            self.base_BN.gather(1, local_BN),
            present_BN,
            lengths,
            shift_BN.gather(1, local_BN),
            lost,
        )
        return frame, local_BN

    def padding(self, mask_BS: Tensor | None) -> Tensor | None:
        """The 2-D mask of the columns: the caller's mask and presence together, bool (B, N); None if all True."""
        real_BN = None if mask_BS is None else mask_BS.bool().gather(1, self.index_BN)
        if real_BN is None or self.present_BN is None:
            return self.present_BN if real_BN is None else real_BN
        return real_BN & self.present_BN

    def labels(self, labels_BS: Tensor) -> Tensor:
        """Labels of the columns, -100 where nothing is present."""
        labels_BN = labels_BS.gather(1, self.index_BN)
        return labels_BN if self.present_BN is None else labels_BN.masked_fill(~self.present_BN, -100)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """What the host knows, on the device. (Made there or copied plainly, it would wait for all work before it.)"""
    return x.to(device, non_blocking=True)


def take(x: Tensor, index_BN: Tensor, dim: int) -> Tensor:
    """Columns of a tensor along its sequence dimension, sample by sample.

    Args:
        x: (..., B or 1, S, ...): samples stand in the dimension before the sequence (position rows of M-RoPE, too).
        index_BN: wanted columns.
        dim: the sequence dimension.
    """
    dim = dim % x.ndim
    return _gather(x, index_BN, dim - 1, dim)


def take_square(mask_BHSS: Tensor, index_BN: Tensor) -> Tensor:
    """Rows and columns of a 4-D mask (B or 1, H or 1, S, S)."""
    return _gather(_gather(mask_BHSS, index_BN, 0, 2), index_BN, 0, 3)


def _gather(x: Tensor, index_BN: Tensor, batch: int, dim: int) -> Tensor:
    if x.shape[batch] != index_BN.shape[0]:
        x = x.expand(*[index_BN.shape[0] if i == batch else -1 for i in range(x.ndim)])
    view, target = [1] * x.ndim, list(x.shape)
    view[batch], view[dim] = index_BN.shape
    target[dim] = index_BN.shape[1]
    return x.gather(dim, index_BN.view(view).expand(target))


def put_tokens(hidden_BND: Tensor, cell_RV: Tensor, valid_RV: Tensor, value_RVD: Tensor, ragged: bool) -> Tensor:
    """Write new values of vision tokens into the sequence; padding is written to a row that is thrown away."""
    B, N, D = hidden_BND.shape
    flat_MD = hidden_BND.reshape(B * N, D)
    if ragged:
        flat_MD = torch.cat([flat_MD, flat_MD.new_zeros(1, D)])
        cell_RV = cell_RV.masked_fill(~valid_RV, B * N)
    flat_MD = flat_MD.index_copy(0, cell_RV.reshape(-1), value_RVD.reshape(-1, D).to(flat_MD.dtype))
    return flat_MD[: B * N].view(B, N, D)


def get_tokens(hidden_BND: Tensor, cell_RV: Tensor) -> Tensor:
    """Vision tokens (R, V, D) of the sequence; where a row is padded, some other token stands."""
    return hidden_BND.reshape(-1, hidden_BND.shape[-1]).index_select(0, cell_RV.reshape(-1)).view(*cell_RV.shape, -1)
