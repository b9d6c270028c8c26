"""A training loader that keeps its place, and goes on in the middle of an epoch."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tpcompress.data import BadRow
from tpcompress.training.datamodules.samplers import BatchOrder

OnBadRows = Callable[[list[tuple[str, BadRow]]], None]


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
    bucket: int = 0
    fresh: bool = True

    def state_dict(self) -> dict[str, int]:
        """Plain numbers for the checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "fresh"}

    def check(self, **now: int) -> None:
        """Refuse another shape in the middle of an epoch: only the same batches can be counted off. Then take it on.

        Raises:
            ValueError: If one of the values that identify the shape has changed.
        """
        then = {name: getattr(self, name) for name in now}
        if not self.fresh and 0 < self.batch < self.batches and then != now:
            where = f"within an epoch (batch {self.batch} of {self.batches})"
            raise ValueError(changed_since(then, now, where, ", or from the end of an epoch"))
        for name, value in now.items():
            setattr(self, name, value)


class KeepsPlace:
    """What the loaders of rows and of streams share.

    Args:
        on_bad_rows: Called in the main process with the bad rows that a batch left out, or had others stand in for.
    """

    def __init__(self, on_bad_rows: OnBadRows | None) -> None:
        self.on_bad_rows = on_bad_rows

    def told(self, batch: dict) -> dict:
        """The batch, once its bad rows are told."""
        if self.on_bad_rows is not None and batch["meta"].bad_rows:
            self.on_bad_rows(batch["meta"].bad_rows)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Empty: the data module stores the position. Lightning takes a loader with this method for resumable."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: see `state_dict`."""


class ResumableLoader(KeepsPlace):
    """Batches of a data set that keeps its place in a `Position`.

    Every iteration is an epoch; the first after a checkpoint is the rest of the interrupted one. Workers start when the
    first batch is asked for, so that they do not prefetch of a wrong epoch. It holds a `DataLoader` and is none:
    Lightning leaves it alone, instead of giving it a sampler of its own in a run on several devices.

    Args:
        dataset: `GoodRows`.
        order: Which rows make this rank's batches.
        position: Kept up to date, and started from. None for validation.
        on_bad_rows: Called in the main process with the bad rows that a batch's rows stood in for.
        **options: Those of `DataLoader`.

    Raises:
        ValueError: One line, if a row is bad and the data set raises.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: BatchOrder,
        position: Position | None = None,
        on_bad_rows: OnBadRows | None = None,
        **options: Any,
    ) -> None:
        super().__init__(on_bad_rows)
        self.dataset = dataset
        self.batch_sampler = order  # DeepSpeed's strategy asks it for the batch size
        self.batch_size = order.batch_size
        self.position = position
        self._loader = DataLoader(dataset, batch_sampler=order, **options)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict]:
        if self.position is not None:
            self._start(self.position)
        for batch in one_line_errors(self._loader):
            if self.position is not None:
                self.position.batch += 1
            yield self.told(batch)

    def _start(self, position: Position) -> None:
        """Go to the next epoch, or back to the place of a checkpoint."""
        over = position.batch >= position.batches if not position.fresh else position.batch > 0
        if over:
            position.epoch, position.batch = position.epoch + 1, 0
        position.fresh = True
        self.batch_sampler.start(position.epoch, position.batch)


def one_line_errors(loader: DataLoader) -> Iterator[Any]:
    """A loader's batches; a ValueError of a worker, which comes with its traceback as text, gets its message back."""
    try:
        yield from loader
    except ValueError as error:
        raise type(error)(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def changed_since(then: dict[str, int], now: dict[str, int], where: str, way_out: str = "") -> str:
    """The message for a checkpoint of a loader of another shape."""
    changed = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if then[name] != now[name])
    return f"The checkpoint lies {where}: {changed} since; resume with what it was trained with{way_out}."
