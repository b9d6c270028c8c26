"""Lightning data module for a user's chat data, read into memory or streamed."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from tpcompress.data import BadRows, ChatCollator, load_chat
from tpcompress.data.bad_rows import say_once
from tpcompress.data.lengths import measure_rates
from tpcompress.data.rows import OnBadRow
from tpcompress.data.shards import Shards, open_shards
from tpcompress.data.split import held_out
from tpcompress.data.stream import ChatStream, Sharing
from tpcompress.data.video import VideoSampling
from tpcompress.training.datamodules.base import RowsData, data_rank
from tpcompress.training.datamodules.loader import ResumableLoader
from tpcompress.training.datamodules.stream_loader import StreamLoader, StreamPosition

log = logging.getLogger(__name__)

_READ: dict[tuple[Any, ...], tuple[datasets.Dataset, BadRows]] = {}

LOOK_AT = 64
"""Rows of a stream of which one should hold an image if the run has a plan."""


class ChatData(RowsData):
    """A user's chat data. Formats: `load_chat`, and `open_shards` for streams.

    Args:
        train: file, folder or hub name of the training data; for streams also a glob pattern or a URL.
        val: file, folder or hub name of the validation data, which is never streamed.
        image_folder: base folder of relative image paths; null for the folder of the file.
        batch_size: rows per batch and rank.
        num_workers: worker processes that decode images.
        on_bad_row: `skip` counts unusable rows and continues, `raise` stops at the first.
        max_length: maximum sequence length in tokens.
        pack: pack the conversations of a row into one sequence.
        val_fraction: share of `train` for validation if there is no `val`. Rows with the same image stay together.
        train_split: split of `train`, for data sets with several.
        val_split: split of `val`.
        seed: seed of the order and of the held-out rows.
        bucket: group rows of similar length within pools of this many batches; 0 disables grouping.
        streaming: read `train` during training, without an index. A stream has no end, so `trainer.max_steps` is
            required.
        shuffle_buffer: rows that each worker of a stream holds and shuffles.
        config_name: config of `train` and `val`, for data sets with several.
        num_frames: frames that are read of a video, spread evenly.
        fps: frames per second that are read of a video, instead of `num_frames`.
        learn_from: `all` answers of a conversation are learnt, or only the `last`.
        pack_sequences: put several rows into one sequence of up to `max_length` tokens.

    Raises:
        ValueError: both `val` and `val_fraction`, `val_fraction` outside [0, 1) or with streaming, or
            `shuffle_buffer` or `num_frames` below 1, or `fps` not positive.
    """

    validation_keys = "val or val_fraction"

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
        config_name: str | None = None,
        num_frames: int | None = 8,
        fps: float | None = None,
        learn_from: Literal["all", "last"] = "all",
        pack_sequences: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, on_bad_row, max_length, pack, seed, bucket)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
        if val is not None and val_fraction:
            raise ValueError(f"Both val ({val}) and val_fraction ({val_fraction}) are given; give one of them.")
        if streaming and val_fraction:
            raise ValueError(f"A stream cannot hold out val_fraction ({val_fraction}) of its rows; set val instead.")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 (no shuffling), got {shuffle_buffer}.")
        self.train = train
        self.val = val
        self.image_folder = image_folder
        self.val_fraction = val_fraction
        self.train_split = train_split
        self.val_split = val_split
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.config_name = config_name
        self.video = VideoSampling(num_frames, fps)
        self.learn_from = learn_from
        self.pack_sequences = pack_sequences
        self.shards: Shards | None = None
        self._stream_position = StreamPosition()

    def load_rows(self) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
        """Read `train` and `val`, or hold out a share of `train`; for a stream, find its shards."""
        train = None
        if self.streaming:
            self._find_stream()
        else:
            train, self.bad_rows = self._load(self.train, self.train_split)
            if self.bad_rows.with_media == 0 and self._has_plan():
                raise ValueError(
                    f"None of the {len(train)} usable rows of {self.train} holds an image or a video, so the plan has "
                    "nothing to prune; put images into the column 'images' or the messages, or set model.plan to null."
                )
        if self.val is not None:
            return train, self._load(self.val, self.val_split)[0]
        if train is None or not self.val_fraction:
            return train, None
        own, held = held_out(train, self.val_fraction, seed=self.seed)
        return train.select(own), train.select(held)

    def make_collator(self, processor: Any, max_positions: int | None = None) -> ChatCollator:
        """The collator of training and validation, see `RowsData`."""
        return ChatCollator(
            processor,
            self.max_length,
            self.pack,
            pack_sequences=self.pack_sequences,
            learn_from=self.learn_from,
            video=self.video,
            max_positions=max_positions,
        )

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """The stream, or rows shuffled by (seed, epoch); each rank gets its share."""
        if self.shards is None:
            return super().train_dataloader()
        return self._stream_loader(self.shards)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, for the checkpoint; with several ranks to be called on all of them."""
        if not self.streaming:
            return super().state_dict()
        processed, batches = self._progress()
        return self._stream_position.state_dict(processed or 0, batches)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in the training data."""
        if self.streaming != ("places" in state_dict):
            was = "streamed" if "places" in state_dict else "not streamed"
            raise ValueError(f"The checkpoint's data were {was}; set data.init_args.streaming as in that run.")
        if self.streaming:
            self._stream_position.loaded = state_dict
        else:
            super().load_state_dict(state_dict)

    def _load(self, source: str, split: str) -> tuple[datasets.Dataset, BadRows]:
        """Read whole data, and say what was left out."""
        known = _READ.pop((source, self.image_folder, split, self.on_bad_row, self.config_name, _stamp(source)), None)
        options: dict[str, Any] = {"split": split, "on_bad_row": self.on_bad_row, "config_name": self.config_name}
        rows, report = known or load_chat(source, self.image_folder, **options)
        _report(source, report)
        return rows, report

    def _has_plan(self) -> bool:
        """Whether the model of the run is pruned."""
        return self.trainer is not None and getattr(self.trainer.lightning_module, "plan", None) is not None

    def _find_stream(self) -> None:
        """Find the shards, when training."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_stops(self.trainer, self.val is not None)
            self.shards = open_shards(self.train, self.train_split, self.config_name)

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
        if self._has_plan():
            _warn_without_media(self.train, stream)
        if self.bucket:
            stream.rates = measure_rates(stream.first_rows(), self.collator.encoder)
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
        return self._opened(StreamLoader(stream, self._stream_position, self._count, **self._options()))


def read_ahead(source: str, image_folder: str | None) -> int:
    """Read training data as `ChatData` does by default, for the next `ChatData` that reads it in this process.

    Args:
        source: `train` of the data.
        image_folder: folder that relative image paths start from.

    Returns:
        number of usable rows.

    Raises:
        FileNotFoundError, ValueError: see `load_chat`.
    """
    _READ.clear()
    found = load_chat(source, image_folder)
    _READ[source, image_folder, "train", "skip", None, _stamp(source)] = found
    return len(found[0])


def _stamp(source: str) -> tuple[int, int] | None:
    """Size and time of a file, so that an edited one is read again."""
    path = Path(source).expanduser()
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None


@rank_zero_only
def _report(source: str, report: BadRows) -> None:
    say_once(source, report)


@rank_zero_only
def _warn_without_media(source: str, stream: ChatStream) -> None:
    first = list(islice(stream.first_rows(), LOOK_AT))
    if first and not any(row["images"] or row["videos"] for row in first):
        log.warning(
            "None of the first %d rows of %s holds an image or a video: the plan has nothing to prune on them.",
            len(first), source,
        )  # fmt: skip


def check_stops(trainer: Any, validates: bool) -> None:
    """Refuse settings that wait for the end of an epoch, because a stream has none.

    Args:
        trainer: Lightning trainer.
        validates: whether there are validation data.

    Raises:
        ValueError: training would never stop, or never validate.
    """
    if trainer.max_steps == -1:
        raise ValueError("A stream has no end: set trainer.max_steps to the number of optimizer steps.")
    if trainer.overfit_batches > 0:
        raise ValueError(f"overfit_batches ({trainer.overfit_batches}) needs data with an index; set streaming: false.")
    ends = isinstance(trainer.limit_train_batches, int) or isinstance(trainer.val_check_interval, int)
    if validates and not ends and trainer.limit_val_batches != 0:
        raise ValueError(
            "A stream has no end of an epoch to validate at: set trainer.val_check_interval to a number of batches."
        )
