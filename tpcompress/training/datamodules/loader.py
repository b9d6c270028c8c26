"""A data loader that tracks its position and resumes within an epoch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tpcompress.data import BatchMeta
from tpcompress.training.datamodules.samplers import ResumableBatchSampler

OnBatch = Callable[[BatchMeta], None]


@dataclass
class Position:
    """Position in the training data, and the settings under which it is valid.

    Attributes:
        epoch: current epoch.
        batch: batches of the epoch that are done.
        batches: length of the epoch in batches, with `limit_train_batches`.
        rows: rows of the data set.
        batch_size: rows per batch and rank.
        world_size: ranks that get different data.
        seed: seed of the order.
        bucket: batches per pool of similar lengths.
        fresh: False from the loading of a checkpoint to the start of the loader.
    """

    epoch: int = 0
    batch: int = 0
    batches: int = 0
    rows: int = 0
    batch_size: int = 0
    world_size: int = 1
    seed: int = 0
    bucket: int = 0
    fresh: bool = True

    def state_dict(self) -> dict[str, int]:
        """Plain numbers for the checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "fresh"}

    def check(self, **now: int) -> None:
        """Store the settings, and refuse changed ones within an epoch, whose batches would be different ones.

        Raises:
            ValueError: a setting has changed within an epoch.
        """
        then = {name: getattr(self, name) for name in now}
        if not self.fresh and 0 < self.batch < self.batches and then != now:
            where = f"within an epoch (batch {self.batch} of {self.batches})"
            raise ValueError(changed_since(then, now, where, ", or from the end of an epoch"))
        for name, value in now.items():
            setattr(self, name, value)


class StatefulLoader:
    """Base class of the loaders of rows and of streams, which Lightning recognises as resumable.

    Args:
        on_batch: called in the main process with the metadata of every batch, to count what was skipped or cut.
    """

    def __init__(self, on_batch: OnBatch | None) -> None:
        self.on_batch = on_batch
        self._running: Any = None

    def close(self) -> None:
        """Stop the worker processes. Left to the garbage collector, each of them is waited for five seconds."""
        running, self._running = self._running, None
        if hasattr(running, "_shutdown_workers"):  # not without workers
            running._shutdown_workers()

    def _batches(self, loader: DataLoader) -> Iterator[Any]:
        """Batches of a loader; an error of a worker, whose message is a traceback, is reduced to its last line."""
        if not loader.persistent_workers:
            self.close()
        self._running = running = iter(loader)
        try:
            yield from running
        except (ValueError, ImportError) as error:
            raise type(error)(re.sub(r"^\w+: ", "", str(error).strip().splitlines()[-1])) from error
        finally:
            if running is self._running and not loader.persistent_workers:
                self.close()

    def reported(self, batch: dict) -> dict:
        """Call `on_batch` with the metadata of a batch, and return the batch."""
        if self.on_batch is not None:
            self.on_batch(batch["meta"])
        return batch

    def state_dict(self) -> dict[str, int]:
        """Empty, because the data module stores the position."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """No effect; see `state_dict`."""


class ResumableLoader(StatefulLoader):
    """Batches of a data set, whose position is tracked in a `Position`.

    Every iteration is an epoch; the first one after a checkpoint is the rest of the interrupted epoch. Workers start
    with the first batch, so they do not prefetch from a wrong epoch. The class wraps a `DataLoader` instead of being
    one, so that Lightning does not replace its sampler in runs on several devices.

    Args:
        dataset: `GoodRows`.
        sampler: sampler of this rank's batches.
        position: updated, and the start of the first epoch; None for validation.
        on_batch: called in the main process with the metadata of every batch.
        **options: options of `DataLoader`.

    Raises:
        ValueError: a bad row, if the data set raises; one line.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: ResumableBatchSampler,
        position: Position | None = None,
        on_batch: OnBatch | None = None,
        **options: Any,
    ) -> None:
        super().__init__(on_batch)
        self.dataset = dataset
        self.batch_sampler = sampler  # DeepSpeed's strategy reads its batch size
        self.batch_size = sampler.batch_size
        self.position = position
        self._loader = DataLoader(dataset, batch_sampler=sampler, **options)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict]:
        if self.position is not None:
            self._start(self.position)
        for batch in self._batches(self._loader):
            if self.position is not None:
                self.position.batch += 1
            yield self.reported(batch)

    def _start(self, position: Position) -> None:
        """Move to the next epoch, or to the position of a checkpoint."""
        done = position.batch >= position.batches if not position.fresh else position.batch > 0
        if done:
            position.epoch, position.batch = position.epoch + 1, 0
        position.fresh = True
        self.batch_sampler.start(position.epoch, position.batch)


def changed_since(then: dict[str, int], now: dict[str, int], where: str, alternative: str = "") -> str:
    """Error message for a checkpoint whose data settings have changed."""
    changed = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if then[name] != now[name])
    return f"The checkpoint lies {where}, and since then {changed}; resume with the settings of that run{alternative}."
