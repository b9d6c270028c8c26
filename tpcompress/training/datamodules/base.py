"""Base class of the data modules: loaders over rows, shuffled by (seed, epoch) and resumable within an epoch.

Images and text are encoded by the `processor` attribute of the run's LightningModule. The order depends only on seed
and epoch, so a run that is resumed within an epoch gets the batches of an uninterrupted run.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

import datasets
import lightning as L
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from tpcompress.data import BadRows, BatchMeta, ChatCollator, GoodRows
from tpcompress.data.lengths import estimate_lengths
from tpcompress.data.rows import OnBadRow
from tpcompress.training.datamodules.loader import Position, ResumableLoader, StatefulLoader
from tpcompress.training.datamodules.samplers import LengthBucketSampler, ResumableBatchSampler
from tpcompress.training.datamodules.stream_loader import StreamLoader

log = logging.getLogger(__name__)

AnyLoader = TypeVar("AnyLoader", bound=StatefulLoader)


class RowsData(LightningDataModule):
    """Loaders over rows; a subclass defines `load_rows`.

    Args:
        batch_size: rows per batch and rank.
        num_workers: worker processes.
        on_bad_row: `skip` or `raise`.
        max_length: maximum sequence length in tokens; None for no limit.
        pack: pack the conversations of a row into one sequence.
        seed: seed of the order.
        bucket: batches per pool of `LengthBucketSampler`; 0 disables it.

    Attributes:
        bad_rows: rows that were skipped, by the reader or in training.
        num_sequences: sequences that this rank was given for training.
        num_cut: those of them that `max_length` cut, or conversations that did not fit into a packed sequence.
        validation_keys: arguments that give validation data, for the error when there are none.

    Raises:
        ValueError: a batch size below 1, or a negative bucket.
    """

    validation_keys: ClassVar[str]

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        on_bad_row: OnBadRow,
        max_length: int | None,
        pack: bool,
        seed: int,
        bucket: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if bucket < 0:
            raise ValueError(f"bucket must be a number of batches, or 0 for no grouping, got {bucket}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.max_length = max_length
        self.pack = pack
        self.seed = seed
        self.bucket = bucket
        self.bad_rows = BadRows()
        self.num_sequences = self.num_cut = 0
        self.train_rows: datasets.Dataset | None = None
        self.val_rows: datasets.Dataset | None = None
        self._position = Position()
        self._seen_bad: set[str] = set()
        self._loaded = False
        self._loaders: list[StatefulLoader] = []

    @abstractmethod
    def load_rows(self) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
        """Training rows (None for a stream) and validation rows (None without validation)."""

    def setup(self, stage: str | None = None) -> None:
        """Read the rows once.

        Raises:
            ValueError: no rows, `validate` without validation rows, or a LightningModule without a processor.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        processor = getattr(module, "processor", None)
        if processor is None:
            raise ValueError(f"{type(module).__name__} has no processor; set self.processor before the data is set up.")
        self.collator = self.make_collator(processor, getattr(module, "max_positions", None))
        if not self._loaded:
            self.train_rows, self.val_rows = self.load_rows()
            self._loaded = True
        for name, rows in (("train", self.train_rows), ("val", self.val_rows)):
            if rows is not None and not len(rows):
                raise ValueError(f"The {name} data of {type(self).__name__} are empty; give at least one row.")
        if stage == TrainerFn.VALIDATING and self.val_rows is None:
            raise ValueError(f"There are no validation data; set {self.validation_keys} of {type(self).__name__}.")

    def make_collator(self, processor: Any, max_positions: int | None = None) -> ChatCollator:
        """The collator of training and validation.

        Args:
            processor: processor of the model.
            max_positions: longest sequence that the model takes; None for no limit.
        """
        return ChatCollator(processor, self.max_length, self.pack, max_positions=max_positions)

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled by (seed, epoch); each rank gets its share."""
        assert self.train_rows is not None
        assert self.trainer is not None
        rows = GoodRows(self.train_rows, self.collator.encode, self.on_bad_row)
        rank, num_ranks = data_rank(self.trainer)
        shape = {"rows": len(rows), "batch_size": self.batch_size, "world_size": num_ranks, "seed": self.seed}
        self._position.check(**shape, bucket=self.bucket)
        sampler = self._sampler(rank, num_ranks)
        return self._opened(
            ResumableLoader(rows, sampler, position=self._position, on_batch=self._count, **self._map_options())
        )

    def val_dataloader(self) -> ResumableLoader | list:
        """In the order of the data, split over the ranks; an empty list without validation data."""
        if self.val_rows is None:
            return []
        assert self.trainer is not None
        rows = GoodRows(self.val_rows, self.collator.encode, self.on_bad_row)
        sampler = ResumableBatchSampler(len(rows), self.batch_size, 0, *data_rank(self.trainer), shuffle=False)
        return self._opened(ResumableLoader(rows, sampler, on_batch=self._count_bad, **self._map_options()))

    def teardown(self, stage: str | None = None) -> None:
        """Stop the workers of all loaders, and say what was skipped and cut in training."""
        if stage == TrainerFn.FITTING:
            self._say_losses()
        while self._loaders:
            self._loaders.pop().close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the workers of all loaders; Lightning skips `teardown` after an exception."""
        self.teardown()

    def _opened(self, loader: AnyLoader) -> AnyLoader:
        """Register a loader for `teardown`."""
        self._loaders.append(loader)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, for the checkpoint; with several ranks to be called on all of them."""
        processed, batches = self._progress()
        state = self._position.state_dict()
        return state if processed is None else state | {"batch": processed, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in the training data."""
        self._position = Position(**state_dict, fresh=False)

    def _sampler(self, rank: int, num_ranks: int) -> ResumableBatchSampler:
        """The sampler of this rank's batches."""
        assert self.train_rows is not None
        assert self.trainer is not None
        shape = (self.batch_size, self.seed, rank, num_ranks)
        same = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # every epoch repeats the first
        if self.bucket and not same:
            return LengthBucketSampler(estimate_lengths(self.train_rows, self.collator.encoder), self.bucket, *shape)
        return ResumableBatchSampler(len(self.train_rows), *shape, shuffle=not same)

    def _progress(self) -> tuple[int | None, int]:
        """Batches of the epoch that are trained on (None outside of training), and the length of the epoch.

        Lightning counts them, so a batch that was fetched but failed is repeated.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return None, 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        return progress["current"]["processed"], int(min(self.trainer.num_training_batches, 2**62))

    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}

    def _map_options(self) -> dict[str, Any]:
        lasting = {"persistent_workers": self.num_workers > 0, "collate_fn": self.collator.pad}
        return self._options() | lasting

    def _count(self, meta: BatchMeta) -> None:
        """Count what was skipped and cut in a training batch; warn at the first."""
        self._count_bad(meta)
        if meta.dropped and not self.num_cut:
            log.warning("A conversation is cut at max_length (%s tokens); further ones are counted.", self.max_length)
        self.num_sequences += len(meta.rows)
        self.num_cut += meta.dropped

    def _count_bad(self, meta: BatchMeta) -> None:
        """Count rows that could not be used; warn at the first."""
        for row_id, bad in meta.bad_rows:
            if row_id in self._seen_bad:
                continue
            if not self._seen_bad:
                log.warning(
                    "Row %s cannot be used: %s. It is replaced by another row; further ones are counted.", row_id, bad
                )
            self._seen_bad.add(row_id)
            self.bad_rows.add(row_id, bad)

    @rank_zero_only
    def _say_losses(self) -> None:
        """Log how many rows were skipped and how many sequences were cut."""
        losses = [str(self.bad_rows)] if len(self.bad_rows) else []
        if self.num_cut:
            losses.append(f"{self.num_cut} of {self.num_sequences} sequences were cut at {self.max_length} tokens")
        if losses:
            log.warning("Training data: %s.", "; ".join(losses))


def data_rank(trainer: L.Trainer) -> tuple[int, int]:
    """Rank of this process among those that get different data, and their number.

    With tensor parallelism several processes get the same data, which the strategy reports.
    """
    known = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return (known["rank"], known["num_replicas"]) if known else (trainer.global_rank, trainer.world_size)
