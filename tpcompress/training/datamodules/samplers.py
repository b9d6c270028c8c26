"""In which order rows are trained on: one rank's batches of an epoch, from the seed and the epoch alone."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

SEED_STRIDE = 1_000_003  # keeps (seed, epoch) pairs apart: seed + epoch would give neighbouring seeds shared epochs


class BatchOrder(Sampler[list[int]]):
    """Batches of row indices, shuffled by (seed, epoch); every rank takes every `num_ranks`-th row.

    Where the rows do not divide by the ranks, the first of the order are used twice: ranks have equally many batches.

    Args:
        num_rows: Rows of the data set.
        batch_size: Rows per batch and rank.
        seed: Of the order.
        rank: Which rank this is,
        num_ranks: of how many that see different data.
        shuffle: False keeps the order of the rows in every epoch.
    """

    def __init__(
        self, num_rows: int, batch_size: int, seed: int = 0, rank: int = 0, num_ranks: int = 1, shuffle: bool = True
    ) -> None:
        self.num_rows, self.batch_size, self.seed, self.shuffle = num_rows, batch_size, seed, shuffle
        self.rank, self.num_ranks = rank, num_ranks
        self._epoch = self._skip = 0

    def start(self, epoch: int, skip: int) -> None:
        """Set what the next iteration yields: `epoch` without its first `skip` batches."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        rows_per_rank = -(-self.num_rows // self.num_ranks)
        return -(-rows_per_rank // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self._skip :])

    def _batches(self) -> list[list[int]]:
        return self._shared_out(self._filled(self._shuffled()))

    def _shuffled(self) -> list[int]:
        """The epoch's order of all rows."""
        if not self.shuffle:
            return list(range(self.num_rows))
        return torch.randperm(self.num_rows, generator=self._generator()).tolist()

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * SEED_STRIDE + self._epoch)

    def _filled(self, order: list[int]) -> list[int]:
        """The order with rows repeated until the ranks' shares are equal."""
        total = -(-self.num_rows // self.num_ranks) * self.num_ranks
        return (order * -(-total // self.num_rows))[:total]

    def _shared_out(self, order: list[int]) -> list[list[int]]:
        """This rank's batches of an order."""
        mine = order[self.rank :: self.num_ranks]
        return [mine[at : at + self.batch_size] for at in range(0, len(mine), self.batch_size)]


class BucketOrder(BatchOrder):
    """Batches of rows of similar length, so that little of a batch is padding.

    The epoch's order is cut into pools of `bucket` batches of all ranks; each pool is sorted by length and cut into
    batches again, of which every rank takes its n-th rows; then the batches of the epoch are shuffled. So ranks have
    similar lengths at the same step, and every row comes once an epoch, as in `BatchOrder`.

    Args:
        lengths: Estimated tokens of every row, the same on all ranks.
        bucket: Batches in a pool; more gives less padding and batches that are less random.
        batch_size: Rows per batch and rank.
        seed: Of the order.
        rank: Which rank this is,
        num_ranks: of how many that see different data.

    Raises:
        ValueError: If `bucket` is not positive.
    """

    def __init__(
        self, lengths: np.ndarray, bucket: int, batch_size: int, seed: int = 0, rank: int = 0, num_ranks: int = 1
    ) -> None:
        super().__init__(len(lengths), batch_size, seed, rank, num_ranks)
        if bucket < 1:
            raise ValueError(f"bucket must be at least 1 batch, got {bucket}; 0 in a recipe means none.")
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
