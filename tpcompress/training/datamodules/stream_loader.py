"""The loader of streamed data: endless, split over ranks and workers, and resumable at the same row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from tpcompress.data.stream import START, ChatStream, Place
from tpcompress.training.datamodules.loader import OnBatch, StatefulLoader, changed_since

HISTORY = 1024
"""Number of batches whose positions are stored; larger than any prefetch or gradient accumulation."""


@dataclass
class StreamPosition:
    """Position in a stream. A Lightning epoch is endless here, unless `limit_train_batches` is given.

    Attributes:
        done: batches that were trained on before the current epoch.
        places: position of every worker's part before the oldest batch of the history.
        shape: settings that determine how the data are split.
        loaded: state of a checkpoint that has not been applied yet.
    """

    done: int = 0
    places: list[Place] = field(default_factory=list)
    shape: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, Any] | None = None
    _history: deque[tuple[int, Place]] = field(default_factory=deque)
    _oldest: int = 0

    @property
    def fetched(self) -> int:
        """Batches returned so far."""
        return self._oldest + len(self._history)

    def record(self, slot: int, place: Place) -> None:
        """Record a returned batch and the position of its slot after it."""
        self._history.append((slot, place))
        if len(self._history) > HISTORY:
            oldest_slot, oldest_place = self._history.popleft()
            self.places[oldest_slot] = oldest_place
            self._oldest += 1

    def before(self, number: int) -> list[Place]:
        """The positions after `number` batches."""
        places = list(self.places)
        for slot, place in list(self._history)[: number - self._oldest]:
            places[slot] = place
        return places

    def set(self, number: int, places: list[Place]) -> None:
        """Move to a position."""
        self.places, self._oldest = list(places), number
        self._history.clear()

    def state_dict(self, processed: int, batches: int) -> dict[str, Any]:
        """Plain numbers of all ranks for the checkpoint; to be called on every rank.

        Args:
            processed: batches of the current epoch that are trained on.
            batches: batches in an epoch.
        """
        own, number = self.before(self.done + processed), self.done + processed
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        all_ranks: list[Any] = [own] * (torch.distributed.get_world_size() if together else 1)
        if together:  # one rank writes the checkpoint, but each needs its own position
            torch.distributed.all_gather_object(all_ranks, own)
        return {
            "number": number, "processed": processed if processed < batches else 0, "places": all_ranks,
            "shape": self.shape,
        }  # fmt: skip

    def check(self, rank: int, shape: dict[str, int]) -> None:
        """Apply the loaded state, if there is one.

        Args:
            rank: global rank.
            shape: settings that determine how the data are split now.

        Raises:
            ValueError: settings that differ from those of the checkpoint, whose positions would not fit.
        """
        self.shape = shape
        if self.loaded is None:
            if not self.places:
                self.set(0, [dict(START) for _ in range(shape["workers"])])
            return
        then = self.loaded["shape"]
        if then != shape:
            raise ValueError(changed_since(then, shape, f"within a stream, after batch {self.loaded['number']}"))
        self.done = self.loaded["number"] - self.loaded["processed"]
        self.set(self.loaded["number"], self.loaded["places"][rank])
        self.loaded = None


class StreamLoader(StatefulLoader):
    """Endless batches of a `ChatStream`; every iteration continues at the current position.

    Args:
        stream: the stream.
        position: updated, and the start of the first iteration.
        on_batch: called in the main process with the metadata of every batch.
        **options: options of `DataLoader`.
    """

    def __init__(
        self, stream: ChatStream, position: StreamPosition, on_batch: OnBatch | None = None, **options: Any
    ) -> None:
        super().__init__(on_batch)
        self.stream = stream
        self.batch_sampler = stream  # DeepSpeed's strategy reads its batch size
        self.batch_size = stream.batch_size
        self.position = position
        self.options = options
        self._started = False

    def __iter__(self) -> Iterator[dict]:
        position, stream = self.position, self.stream
        if self._started:  # the next epoch of Lightning; all returned batches were trained on
            position.done = position.fetched
        self._started = True
        position.set(position.fetched, position.before(position.fetched))
        stream.places, stream.first = position.places, position.fetched % stream.sharing.slots
        # A new loader each time, because persistent workers would keep their old positions.
        loader = DataLoader(stream, batch_size=None, collate_fn=_identity, **self.options)
        for slot, place, batch in self._batches(loader):
            position.record(slot, place)
            yield self.reported(batch)


def _identity(item: Any) -> Any:
    return item
