"""Lightning data modules: a user's chat data, and the procedural benchmark.

The processor is that of the run's LightningModule (its ``processor`` attribute). Training order depends on the seed and
the epoch alone, and a run resumed from a checkpoint, also from within an epoch, sees the batches it would have seen.
"""

import logging
from abc import abstractmethod
from typing import Any

import datasets
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from tpcompress.data import BadRow, BadRows, ChatCollator, GoodRows, load_chat
from tpcompress.data.benchmark import draw_benchmark
from tpcompress.data.rows import OnBadRow

from .loader import EpochSampler, Position, ResumableLoader

log = logging.getLogger(__name__)


class RowsData(LightningDataModule):
    """Loaders over rows; a subclass says which rows.

    `bad_rows` counts what was left out: by the reader, and, by data set index, what turned out bad in training.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        on_bad_row: OnBadRow,
        max_length: int | None,
        pack: bool,
        seed: int,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.max_length = max_length
        self.pack = pack
        self.seed = seed
        self.bad_rows = BadRows()
        self.train_rows: datasets.Dataset | None = None
        self.val_rows: datasets.Dataset | None = None
        self._position = Position()
        self._seen_bad: set[str] = set()

    @abstractmethod
    def load_rows(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Rows to train on and rows to validate on."""

    def setup(self, stage: str | None = None) -> None:
        """Read the rows, once.

        Raises:
            ValueError: If there are none, or the LightningModule has no processor.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        processor = getattr(module, "processor", None)
        if processor is None:
            raise ValueError(f"{type(module).__name__} has no processor; set self.processor before the data is set up.")
        self.collator = ChatCollator(processor, self.max_length, self.pack)
        if self.train_rows is None:
            self.train_rows, self.val_rows = self.load_rows()
        for name, rows in (("train", self.train_rows), ("val", self.val_rows)):
            if rows is not None and not len(rows):
                raise ValueError(f"The {name} data of {type(self).__name__} is empty; give at least one row.")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled by (seed, epoch); each rank gets its share."""
        assert self.train_rows is not None
        assert self.trainer is not None
        rows = GoodRows(self.train_rows, self.collator.encode, self.on_bad_row)
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        self._check_resumable(len(rows), world_size)
        sampler = EpochSampler(len(rows), self.seed, rank, world_size)
        options = self._options()
        return ResumableLoader(rows, position=self._position, on_bad_rows=self._note_bad, sampler=sampler, **options)

    def val_dataloader(self) -> ResumableLoader | list:
        """In the order of the rows; no loader if there is nothing to validate on."""
        if self.val_rows is None:
            return []
        rows = GoodRows(self.val_rows, self.collator.encode, self.on_bad_row)
        return ResumableLoader(rows, on_bad_rows=self._note_bad, **self._options())

    def state_dict(self) -> dict[str, int]:
        """The place in the training data, for the checkpoint."""
        state = self._position.state_dict()
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            # Lightning's own count: a batch that was fetched but failed is done again.
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
            state["batch"] = progress["current"]["processed"]
            state["batches"] = int(min(self.trainer.num_training_batches, 2**62))
        return state

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take up the place in the training data."""
        self._position = Position(**state_dict, fresh=False)

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "collate_fn": self.collator.pad,
            "pin_memory": torch.cuda.is_available(),
        }

    def _check_resumable(self, num_rows: int, world_size: int) -> None:
        """Batches of an interrupted epoch can only be counted off if they are the same batches."""
        place = self._position
        now = {"rows": num_rows, "batch_size": self.batch_size, "world_size": world_size, "seed": self.seed}
        then = {name: getattr(place, name) for name in now}
        if not place.fresh and 0 < place.batch < place.batches and then != now:
            changed = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if then[name] != now[name])
            raise ValueError(
                f"The checkpoint lies within an epoch (batch {place.batch} of {place.batches}): {changed} since; "
                "resume with what it was trained with, or from the end of an epoch."
            )
        place.rows, place.batch_size, place.world_size, place.seed = now.values()

    def _note_bad(self, bad_rows: list[tuple[str, BadRow]]) -> None:
        """Count rows that turned out bad in training; warn at the first."""
        for row_id, bad in bad_rows:
            if row_id in self._seen_bad:
                continue
            if not self._seen_bad:
                log.warning(
                    "Row %s cannot be used: %s. Another takes its place; more such rows are counted.", row_id, bad
                )
            self._seen_bad.add(row_id)
            self.bad_rows.add(row_id, bad)


class ChatData(RowsData):
    """A user's chat data; see `load_chat` for the formats.

    Args:
        train: File, folder or hub name to train on.
        val: The same to validate on.
        image_folder: What relative image paths start from; by default the folder of the file.
        batch_size: Rows per batch and rank.
        num_workers: Processes that decode images.
        on_bad_row: ``skip`` counts broken rows and goes on, ``raise`` stops at the first.
        max_length: Longest sequence in tokens.
        pack: Rows with several conversations become one sequence each.
        val_fraction: Part of `train` to validate on if there is no `val`.
        train_split: Split of `train`, for data that has several.
        val_split: Split of `val`.
        seed: Of the order and of the rows held out.

    Raises:
        ValueError: If `val` and `val_fraction` are both given, or `val_fraction` is not in [0, 1).
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        image_folder: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        on_bad_row: OnBadRow = "skip",
        max_length: int | None = None,
        pack: bool = False,
        val_fraction: float = 0.0,
        train_split: str = "train",
        val_split: str = "train",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, on_bad_row, max_length, pack, seed)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
        if val is not None and val_fraction:
            raise ValueError(f"Both val ({val}) and val_fraction ({val_fraction}) are given; give one of them.")
        self.train = train
        self.val = val
        self.image_folder = image_folder
        self.val_fraction = val_fraction
        self.train_split = train_split
        self.val_split = val_split

    def load_rows(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Read `train`, and `val` or the held-out part."""
        train, self.bad_rows = load_chat(self.train, self.image_folder, self.train_split, self.on_bad_row)
        _report(self.train, self.bad_rows)
        if self.val is not None:
            val, report = load_chat(self.val, self.image_folder, self.val_split, self.on_bad_row)
            _report(self.val, report)
            return train, val
        if not self.val_fraction:
            return train, None
        return _held_out(train, self.val_fraction, self.seed)


class BenchmarkData(RowsData):
    """The procedural benchmark: pictures with a question of every family.

    Args:
        num_train: Pictures to train on.
        num_val: Pictures to validate on, 0 for none.
        batch_size: Pictures per batch and rank.
        seed: Of the pictures and of their order.
        pack: The questions about a picture share its vision tokens in one sequence.
        num_workers: Processes that encode.
        max_length: Longest sequence in tokens.
    """

    def __init__(
        self,
        num_train: int = 4800,
        num_val: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        pack: bool = True,
        num_workers: int = 0,
        max_length: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, "raise", max_length, pack, seed)
        self.num_train = num_train
        self.num_val = num_val

    def load_rows(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Draw the pictures."""
        val = draw_benchmark("validation", self.num_val, self.seed) if self.num_val else None
        return draw_benchmark("train", self.num_train, self.seed), val


@rank_zero_only
def _report(source: str, report: BadRows) -> None:
    log.log(logging.WARNING if len(report) else logging.INFO, "%s: %s", source, report)


def _held_out(rows: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training rows and a random `fraction`, at least one row, in the order of the data."""
    if len(rows) < 2:
        raise ValueError(f"val_fraction needs at least 2 usable rows, got {len(rows)}; give val, or no val_fraction.")
    number = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select(sorted(order[number:])), rows.select(sorted(order[:number]))
