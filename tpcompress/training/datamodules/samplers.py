"""Batch samplers whose order depends only on seed and epoch, so that an epoch can be resumed at any batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

SEED_STRIDE = 1_000_003  # with seed + epoch, neighbouring seeds would share epochs


class ResumableBatchSampler(Sampler[list[int]]):
    """Batches of row indices, shuffled by (seed, epoch); every rank takes every `num_ranks`-th row.

    If the rows do not divide by the ranks, the first of the order are used twice, so that ranks have equally many
    batches.

    Args:
        num_rows: rows of the data set.
        batch_size: rows per batch and rank.
        seed: seed of the order.
        rank: rank of this process among those that get different data.
        num_ranks: number of processes that get different data.
        shuffle: False keeps the order of the rows in every epoch.
    """

    def __init__(
        self, num_rows: int, batch_size: int, seed: int = 0, rank: int = 0, num_ranks: int = 1, shuffle: bool = True
    ) -> None:
        self.num_rows, self.batch_size, self.seed, self.shuffle = num_rows, batch_size, seed, shuffle
        self.rank, self.num_ranks = rank, num_ranks
        self._epoch = self._skip = 0

    def start(self, epoch: int, skip: int) -> None:
        """Set the next iteration to `epoch` without its first `skip` batches."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        rows_per_rank = -(-self.num_rows // self.num_ranks)
        return -(-rows_per_rank // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self._skip :])

    def _batches(self) -> list[list[int]]:
        return self._of_this_rank(self._filled(self._shuffled()))

    def _shuffled(self) -> list[int]:
        """The epoch's order of all rows."""
        if not self.shuffle:
            return list(range(self.num_rows))
        return torch.randperm(self.num_rows, generator=self._generator()).tolist()

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * SEED_STRIDE + self._epoch)

    def _filled(self, order: list[int]) -> list[int]:
        """The order, with rows repeated until the ranks' shares are equal."""
        total = -(-self.num_rows // self.num_ranks) * self.num_ranks
        return (order * -(-total // self.num_rows))[:total]

    def _of_this_rank(self, order: list[int]) -> list[list[int]]:
        """This rank's batches of an order."""
        own = order[self.rank :: self.num_ranks]
        return [own[at : at + self.batch_size] for at in range(0, len(own), self.batch_size)]


class LengthBucketSampler(ResumableBatchSampler):
    """Batches of rows of similar length, to reduce padding.

    The shuffled order is divided into pools of `bucket` batches of all ranks. Each pool is sorted by length and divided
    into batches, of which every rank takes its share; then the batches of the epoch are shuffled. Ranks thus have
    similar lengths at the same step, and every row occurs once per epoch.

    Args:
        lengths: estimated tokens of every row, equal on all ranks.
        bucket: batches per pool; larger pools give less padding and less random batches.
        batch_size: rows per batch and rank.
        seed: seed of the order.
        rank: rank of this process among those that get different data.
        num_ranks: number of processes that get different data.

    Raises:
        ValueError: `bucket` below 1.
    """

    def __init__(
        self, lengths: np.ndarray, bucket: int, batch_size: int, seed: int = 0, rank: int = 0, num_ranks: int = 1
    ) -> None:
        super().__init__(len(lengths), batch_size, seed, rank, num_ranks)
        if bucket < 1:
            raise ValueError(f"bucket must be at least 1 batch, got {bucket}; set 0 in a recipe to disable grouping.")
        self.lengths, self.bucket = lengths, bucket

    def _batches(self) -> list[list[int]]:
        order = np.array(self._filled(self._shuffled()))
        together = self.batch_size * self.num_ranks
        pools = (order[at : at + self.bucket * together] for at in range(0, len(order), self.bucket * together))
        batches = [
            pool[at : at + together]
            for pool in (pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools)
            for at in range(0, len(pool), together)
        ]
        turns = torch.randperm(len(batches), generator=self._generator()).tolist()
        return [batches[turn][self.rank :: self.num_ranks].tolist() for turn in turns]
