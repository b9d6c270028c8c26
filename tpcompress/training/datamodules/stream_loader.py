"""The loader of streamed data: endless, shared out over ranks and workers, and resumed at the same row."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from tpcompress.data.stream import START, ChatStream, Place
from tpcompress.training.datamodules.loader import KeepsPlace, OnBadRows, changed_since, one_line_errors

HISTORY = 1024
"""Batches whose places are kept: more than are fetched ahead of training, or done again after an interruption."""


@dataclass
class StreamPosition:
    """Where training is in a stream: `done` batches of the run were trained on before the current epoch.

    An epoch is what Lightning takes for one: endless, unless ``limit_train_batches`` is given. `places` has the place
    of every worker's part before the oldest batch in the history; `shape` identifies how the data are shared out.
    """

    done: int = 0
    places: list[Place] = field(default_factory=list)
    shape: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, Any] | None = None
    _history: deque[tuple[int, Place]] = field(default_factory=deque)
    _oldest: int = 0

    @property
    def fetched(self) -> int:
        """Batches handed out so far."""
        return self._oldest + len(self._history)

    def note(self, slot: int, place: Place) -> None:
        """One more batch was handed out; its slot is behind it now."""
        self._history.append((slot, place))
        if len(self._history) > HISTORY:
            oldest_slot, oldest_place = self._history.popleft()
            self.places[oldest_slot] = oldest_place
            self._oldest += 1

    def before(self, number: int) -> list[Place]:
        """The places as they were after `number` batches."""
        places = list(self.places)
        for slot, place in list(self._history)[: number - self._oldest]:
            places[slot] = place
        return places

    def set(self, number: int, places: list[Place]) -> None:
        """Be at a place."""
        self.places, self._oldest = list(places), number
        self._history.clear()

    def state_dict(self, processed: int, batches: int) -> dict[str, Any]:
        """Plain numbers for the checkpoint, of all ranks; to be called on every one.

        Args:
            processed: Batches of the current epoch that training is done with.
            batches: Batches in an epoch.
        """
        mine, number = self.before(self.done + processed), self.done + processed
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        everyone: list[Any] = [mine] * (torch.distributed.get_world_size() if together else 1)
        if together:  # a checkpoint is written by one rank, but each reads its own part
            torch.distributed.all_gather_object(everyone, mine)
        return {
            "number": number, "processed": processed if processed < batches else 0, "places": everyone,
            "shape": self.shape,
        }  # fmt: skip

    def check(self, rank: int, shape: dict[str, int]) -> None:
        """Take up what was loaded, if anything.

        Args:
            rank: Of all processes.
            shape: How the data are shared out now.

        Raises:
            ValueError: If they were shared out otherwise: the places would not fit.
        """
        self.shape = shape
        if self.loaded is None:
            if not self.places:
                self.set(0, [dict(START) for _ in range(shape["workers"])])
            return
        then = self.loaded["shape"]
        if then != shape:
            raise ValueError(changed_since(then, shape, f"within a stream, behind batch {self.loaded['number']}"))
        self.done = self.loaded["number"] - self.loaded["processed"]
        self.set(self.loaded["number"], self.loaded["places"][rank])
        self.loaded = None


class StreamLoader(KeepsPlace):
    """Endless batches of a `ChatStream`; every iteration goes on where training is.

    Args:
        stream: What to read.
        position: Kept up to date, and started from.
        on_bad_rows: Called in the main process with the rows that were left out.
        **options: Those of `DataLoader`.
    """

    def __init__(
        self, stream: ChatStream, position: StreamPosition, on_bad_rows: OnBadRows | None = None, **options: Any
    ) -> None:
        super().__init__(on_bad_rows)
        self.stream = stream
        self.batch_sampler = stream  # DeepSpeed's strategy asks it for the batch size
        self.batch_size = stream.batch_size
        self.position = position
        self.options = options
        self._started = False

    def __iter__(self) -> Iterator[dict]:
        position, stream = self.position, self.stream
        if self._started:  # Lightning's next epoch; all that was handed out was trained on
            position.done = position.fetched
        self._started = True
        position.set(position.fetched, position.before(position.fetched))
        stream.places, stream.first = position.places, position.fetched % stream.sharing.slots
        # A new one each time: workers that live on could not be told their places.
        loader = DataLoader(stream, batch_size=None, collate_fn=_as_it_is, **self.options)
        for slot, place, batch in one_line_errors(loader):
            position.note(slot, place)
            yield self.told(batch)


def _as_it_is(item: Any) -> Any:
    return item
