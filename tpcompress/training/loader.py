"""A training loader whose order depends on (seed, epoch) alone and that goes on in the middle of an epoch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tpcompress.data import BadRow

SEED_STRIDE = 1_000_003  # keeps (seed, epoch) pairs apart: seed + epoch would give neighbouring seeds shared epochs


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch) and takes every `num_replicas`-th row; the ranks' shares are of equal length.

    Where the rows do not divide by the ranks, the first of the order are used twice. Being a `DistributedSampler`, it
    is left alone by Lightning, which would otherwise wrap it. `start` sets the epoch and the rows to pass over.
    """

    def __init__(self, num_rows: int, seed: int = 0, rank: int = 0, num_replicas: int = 1) -> None:
        super().__init__(range(num_rows), num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self._num_rows = num_rows
        self._skip = 0

    def start(self, epoch: int, skip: int) -> None:
        """Set what the next iteration yields: `epoch` without its first `skip` rows of this rank."""
        self.epoch, self._skip = epoch, skip

    def set_epoch(self, epoch: int) -> None:
        """Ignored: Lightning's count is off by one after some resumptions; `ResumableLoader` keeps its own."""

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + self.epoch)
        order = torch.randperm(self._num_rows, generator=generator).tolist()
        order = (order * math.ceil(self.total_size / self._num_rows))[: self.total_size]
        return iter(order[self.rank :: self.num_replicas][self._skip :])


@dataclass
class Position:
    """Where training is in its data: `batch` batches of `epoch` are done. The rest identifies the loader's shape.

    `batches` is the epoch's length in batches as trained (``limit_train_batches`` included). `fresh` is False from
    when a checkpoint is loaded until the loader starts.
    """

    epoch: int = 0
    batch: int = 0
    batches: int = 0
    rows: int = 0
    batch_size: int = 0
    world_size: int = 1
    seed: int = 0
    fresh: bool = True

    def state_dict(self) -> dict[str, int]:
        """Plain numbers for the checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "fresh"}


class ResumableLoader(DataLoader):
    """DataLoader that keeps its place in a `Position`.

    Every iteration is an epoch; the first after a checkpoint is the rest of the interrupted one. The sampler starts
    when the first batch is asked for, so that workers do not prefetch of a wrong epoch.

    Args:
        dataset: `GoodRows`.
        position: Kept up to date, and started from; needs an `EpochSampler`. None for validation.
        on_bad_rows: Called in the main process with the bad rows that a batch's rows stood in for.
        **options: Those of `DataLoader`.

    Raises:
        ValueError: One line, if a row is bad and the data set raises.
    """

    def __init__(
        self,
        dataset: Dataset,
        position: Position | None = None,
        on_bad_rows: Callable[[list[tuple[str, BadRow]]], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.position = position
        self.on_bad_rows = on_bad_rows

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]  # a generator: it starts late
        if isinstance(self.sampler, EpochSampler) and self.position is not None:
            self._start(self.position, self.sampler)
        try:
            for batch in super().__iter__():
                if self.position is not None:
                    self.position.batch += 1
                if self.on_bad_rows is not None and batch["meta"].bad_rows:
                    self.on_bad_rows(batch["meta"].bad_rows)
                yield batch
        except ValueError as error:  # a worker's comes with its traceback as text
            raise type(error)(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error

    def state_dict(self) -> dict[str, int]:
        """Empty: the data module stores the position. Lightning takes a loader with this method for resumable."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: see `state_dict`."""

    def _start(self, position: Position, sampler: EpochSampler) -> None:
        """Go to the next epoch, or back to the place of a checkpoint."""
        over = position.batch >= position.batches if not position.fresh else position.batch > 0
        if over:
            position.epoch, position.batch = position.epoch + 1, 0
        position.fresh = True
        sampler.start(position.epoch, position.batch * (self.batch_size or 1))
