"""THE file that shortens: where vision tokens are in the sequence, and what is left of it after a stage.

B samples, S positions of the original sequence, N columns of the sequence at hand, R budget rows (one per image or
per prompt), V vision tokens of a row (padded), D hidden size. Counts live on the host, so nothing here waits for a GPU
except `locate` and `Frame.full` for a batch of several samples (once per prefill).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpcompress.families import ImageTokens


@dataclass(frozen=True)
class Rows:
    """The vision tokens still in the sequence, one row per budget.

    Attributes:
        owner: sample of each row.
        total: tokens that the projector produced for each row.
        count: tokens of each row that are still there.
        owner_R: `owner` on the device.
        index_RV: position of each token in the original sequence.
        token_RV: number of each token within its row, 0 .. total - 1.
        valid_RV: False where a shorter row is padded.
        cols_R: width of the grid that the row's tokens came from.
        canvas: (rows, columns) that hold every grid.
    """

    owner: list[int]
    total: list[int]
    count: list[int]
    owner_R: Tensor
    index_RV: Tensor
    token_RV: Tensor
    valid_RV: Tensor
    cols_R: Tensor
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
        )

    def retained_RV(self) -> Tensor:
        """bool (R, largest total): which of its original tokens each row still has."""
        kept_RV = torch.zeros(len(self.total), max(self.total) + 1, dtype=torch.bool, device=self.index_RV.device)
        return kept_RV.scatter_(1, self.token_RV.masked_fill(~self.valid_RV, max(self.total)), True)[:, :-1]


def locate(placeholder_BS: Tensor, images: ImageTokens, scope: str) -> Rows:
    """Find the vision tokens of every image.

    Args:
        placeholder_BS: True where the sequence holds a vision token.
        images: how many tokens each image brings, in the order of the placeholders.
        scope: `image` for one row per image, `prompt` for one row per sample.

    Raises:
        ValueError: more vision tokens than positions. (Other mismatches are found by transformers, a moment later.)
    """
    B, S = placeholder_BS.shape
    if sum(images.counts) > B * S:
        raise ValueError(
            f"{len(images.counts)} images bring {sum(images.counts)} vision tokens, but the batch has only {B * S} "
            f"positions; pass the images that its placeholders name."
        )
    device = placeholder_BS.device
    # A stable sort instead of `nonzero`: the number of placeholders is known, so the host need not ask for it.
    place_T = (~placeholder_BS.reshape(-1)).to(torch.int8).argsort(stable=True)[: sum(images.counts)]
    starts = [sum(images.counts[:i]) for i in range(len(images.counts))]
    owner = [0] * len(starts)
    if B > 1:
        owner = (place_T[torch.tensor(starts, device=device)] // S).cpu().numpy().tolist()
    groups = [(o, s, c, g) for o, s, c, g in zip(owner, starts, images.counts, images.grids, strict=True)]
    if scope == "prompt":
        groups = [_stack([g for g in groups if g[0] == sample]) for sample in dict.fromkeys(owner)]
    counts = [count for _, _, count, _ in groups]
    token_V = torch.arange(max(counts), device=device)
    count_R1 = torch.tensor(counts, device=device)[:, None]
    start_R1 = torch.tensor([start for _, start, _, _ in groups], device=device)[:, None]
    valid_RV = token_V < count_R1
    index_RV = place_T[(start_R1 + token_V.minimum(count_R1 - 1))] % S
    return Rows(
        owner=[o for o, *_ in groups],
        total=counts,
        count=counts,
        owner_R=torch.tensor([o for o, *_ in groups], device=device),
        index_RV=index_RV,
        token_RV=token_V.expand_as(index_RV).minimum(count_R1 - 1),
        valid_RV=valid_RV,
        cols_R=torch.tensor([grid[1] for *_, grid in groups], device=device),
        canvas=(max(grid[0] for *_, grid in groups), max(grid[1] for *_, grid in groups)),
    )


def _stack(images: list[tuple[int, int, int, tuple[int, int]]]) -> tuple[int, int, int, tuple[int, int]]:
    """One row of a prompt's images: grids of one width stand on top of each other, others form a single run."""
    count = sum(c for _, _, c, _ in images)
    widths = {grid[1] for *_, grid in images}
    grid = (sum(g[0] for *_, g in images), widths.pop()) if len(widths) == 1 else (1, count)
    return images[0][0], images[0][1], count, grid


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


def take(x: Tensor, index_BN: Tensor, dim: int) -> Tensor:
    """Columns of a tensor along its sequence dimension, sample by sample.

    Args:
        x: (B or 1, ..., S, ...); the batch is dimension 0, or the one before `dim` if that is not 0 (M-RoPE rows).
        index_BN: wanted columns.
        dim: the sequence dimension.
    """
    dim = dim % x.ndim
    batch = 0 if x.shape[0] in (1, index_BN.shape[0]) or dim == 0 else dim - 1
    if x.shape[batch] != index_BN.shape[0]:
        x = x.expand(*[index_BN.shape[0] if i == batch else -1 for i in range(x.ndim)])
    view = [1] * x.ndim
    view[batch], view[dim] = index_BN.shape
    target = list(x.shape)
    target[dim] = index_BN.shape[1]
    return x.gather(dim, index_BN.view(view).expand(target))


def take_square(mask_BHSS: Tensor, index_BN: Tensor) -> Tensor:
    """Rows and columns of a 4-D mask (B or 1, H or 1, S, S)."""
    return take(take(mask_BHSS, index_BN, 2), index_BN, 3)


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
