"""Lightning data modules: a user's chat data, and the procedural benchmark.

The processor is that of the run's LightningModule (its ``processor`` attribute). Training order depends on the seed and
the epoch alone, and a run resumed from a checkpoint, also from within an epoch, sees the batches it would have seen.
"""

import logging
from typing import Any

import datasets
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from tpcompress.data import BadRows, load_chat
from tpcompress.data.benchmark import draw_benchmark
from tpcompress.data.lengths import measure_rates
from tpcompress.data.rows import OnBadRow
from tpcompress.data.shards import Shards, open_shards
from tpcompress.data.stream import ChatStream, Sharing
from tpcompress.training.datamodules.base import RowsData, data_rank
from tpcompress.training.datamodules.loader import ResumableLoader
from tpcompress.training.datamodules.stream_loader import StreamLoader, StreamPosition

log = logging.getLogger(__name__)


class ChatData(RowsData):
    """A user's chat data; see `load_chat` for the formats, and `open_shards` for those of streams.

    Args:
        train: File, folder or hub name to train on; a stream's may be a pattern or an address.
        val: File, folder or hub name to validate on; never streamed.
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
        bucket: Draw batches of rows of similar length from pools of this many batches; 0 draws them from all rows.
        streaming: Read `train` as it is trained on, without an index or a look through it beforehand. A stream
            has no end: ``trainer.max_steps`` says when to stop.
        shuffle_buffer: Rows that every worker of a stream shuffles at a time, and holds.

    Raises:
        ValueError: If `val` and `val_fraction` are both given, `val_fraction` is not in [0, 1), or a stream is to give
            rows to validate on.
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
        bucket: int = 0,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(batch_size, num_workers, on_bad_row, max_length, pack, seed, bucket)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
        if val is not None and val_fraction:
            raise ValueError(f"Both val ({val}) and val_fraction ({val_fraction}) are given; give one of them.")
        if streaming and val_fraction:
            raise ValueError(f"A stream cannot hold out val_fraction ({val_fraction}) of its rows; give val.")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 row, which keeps the order, got {shuffle_buffer}.")
        self.train = train
        self.val = val
        self.image_folder = image_folder
        self.val_fraction = val_fraction
        self.train_split = train_split
        self.val_split = val_split
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.shards: Shards | None = None
        self._stream_position = StreamPosition()

    def load_rows(self) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
        """Read `train`, and `val` or the held-out part; of a stream, find its shards."""
        train = None
        if self.streaming:
            self._find_stream()
        else:
            train, self.bad_rows = load_chat(self.train, self.image_folder, self.train_split, self.on_bad_row)
            _report(self.train, self.bad_rows)
        if self.val is not None:
            val, report = load_chat(self.val, self.image_folder, self.val_split, self.on_bad_row)
            _report(self.val, report)
            return train, val
        if train is None or not self.val_fraction:
            return train, None
        return _held_out(train, self.val_fraction, self.seed)

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled by (seed, epoch), or the stream; each rank gets its share."""
        if self.shards is None:
            return super().train_dataloader()
        return self._stream_loader(self.shards)

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data, for the checkpoint; on several devices to be called on all of them."""
        if not self.streaming:
            return super().state_dict()
        processed, batches = self._progress()
        return self._stream_position.state_dict(processed or 0, batches)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the place in the training data."""
        if self.streaming != ("places" in state_dict):
            was = "streamed" if "places" in state_dict else "not streamed"
            raise ValueError(f"The checkpoint's data were {was}; set data.init_args.streaming as it was.")
        if self.streaming:
            self._stream_position.loaded = state_dict
        else:
            super().load_state_dict(state_dict)

    def _find_stream(self) -> None:
        """Find the shards, if they are to be trained on."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_endless(self.trainer, self.val is not None)
            self.shards = open_shards(self.train, self.train_split)

    def _stream_loader(self, shards: Shards) -> StreamLoader:
        assert self.trainer is not None
        rank, num_ranks = data_rank(self.trainer)
        sharing = Sharing(rank, num_ranks, max(1, self.num_workers))
        stream = ChatStream(
            shards,
            self.collator,
            self.batch_size,
            self.image_folder,
            self.on_bad_row,
            shuffle_buffer=self.shuffle_buffer,
            bucket=self.bucket,
            seed=self.seed,
            sharing=sharing,
        )
        if self.bucket:
            stream.rates = measure_rates(stream.some_rows(), self.collator.encoder)
        shape = {
            "shards": len(shards),
            "batch_size": self.batch_size,
            "world_size": num_ranks,
            "workers": sharing.slots,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "bucket": self.bucket,
        }
        self._stream_position.check(self.trainer.global_rank, shape)
        return StreamLoader(stream, self._stream_position, self._note_bad, **self._options())


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

    def load_rows(self) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
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


def check_endless(trainer: Any, validates: bool) -> None:
    """Refuse settings that wait for the end of an epoch: a stream has none.

    Args:
        trainer: A Lightning trainer.
        validates: Whether there are data to validate on.

    Raises:
        ValueError: If training would not stop, or never validate.
    """
    if trainer.max_steps == -1:
        raise ValueError("A stream has no end: set trainer.max_steps to the number of optimizer steps.")
    if trainer.overfit_batches > 0:
        raise ValueError(
            f"overfit_batches ({trainer.overfit_batches}) needs data that are read whole; set streaming false."
        )
    ends = isinstance(trainer.limit_train_batches, int) or isinstance(trainer.val_check_interval, int)
    if validates and not ends and trainer.limit_val_batches != 0:
        raise ValueError(
            "A stream's epoch has no end to validate at: set trainer.val_check_interval to a number of batches."
        )
