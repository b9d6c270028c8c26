"""Streaming data set for training: distributed over ranks and workers, shuffled, and resumable at the same row.

A *part* is what one worker of one rank reads. In every pass (epoch) over the data, the shards are ordered by
(seed, pass). The parts take equal numbers of whole shards; of each remaining shard, every part takes every n-th row.
A pass of all parts therefore covers every row once. Parts with short shards start their next pass earlier: the stream
is endless, no rank runs out of batches, and the length of a run must be given in steps.

Rows are shuffled in blocks seeded by (seed, part, block) instead of in a running buffer. The position in the data is
then a few numbers, and resuming reads at most one block again.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from tpcompress.data.arrow_rows import completed
from tpcompress.data.bad_rows import BadRow, OnBadRow, bad_row_error, check_on_bad_row
from tpcompress.data.lengths import Rates, count_characters, count_media
from tpcompress.data.records import Record, Row, clean, read_record
from tpcompress.data.shards import Shards
from tpcompress.errors import first_line
from tpcompress.paths import check_image_folder

GIVE_UP_AFTER = 10_000  # consecutive bad rows
Place = dict[str, int]
"""Position of a part in the data: `block` number, its start (`epoch`, `shard` of the pass, `row` of the shard), and the
number of its rows `used` so far."""
START: Place = {"epoch": 0, "shard": 0, "row": 0, "block": 0, "used": 0}


@dataclass
class RawRow:
    """A row with references to its images and videos, as `read_record` gives it.

    Attributes:
        ends: the row is the last of its batch (streams with buckets).
    """

    row: Row
    ends: bool = False


@dataclass(frozen=True)
class Sharing:
    """How the data is distributed: this rank is `rank` of `num_ranks`, and every rank has `slots` workers."""

    rank: int = 0
    num_ranks: int = 1
    slots: int = 1


class ChatStream(IterableDataset):
    """Endless batches of streamed rows, as `(slot, place, batch)`; `place` is the slot's position after the batch.

    Batches are taken from the slots (workers) in turn. To resume, set `places` (one per slot) and `first` (the next
    slot) before iterating.

    Args:
        shards: shards to read.
        collator: object with `encode` and `pad`, such as `ChatCollator`.
        batch_size: rows per batch.
        image_folder: folder that relative image paths are resolved against; by default the folder of the files.
        on_bad_row: `skip` leaves out bad rows and unreadable shards and lists them in the metadata of the next batch;
            `raise` stops.
        shuffle_buffer: rows per shuffled block, held undecoded; 1 keeps the order of the data.
        bucket: batches per pool that is sorted by estimated length; 0 disables sorting. All ranks go through their
            pools in the same order of lengths. Batches can be shorter after a bad row and at the end of a block.
        rates: rates for the estimated lengths.
        seed: seed of all orders.
        sharing: rank and number of workers.

    Raises:
        ValueError: while iterating: a row is bad under `raise`, too many consecutive rows are bad, or a part has no
            rows.
        FileNotFoundError: `image_folder` does not exist.
    """

    def __init__(
        self,
        shards: Shards,
        collator: Any,
        batch_size: int,
        image_folder: str | Path | None = None,
        on_bad_row: OnBadRow = "skip",
        shuffle_buffer: int = 1000,
        bucket: int = 0,
        rates: Rates | None = None,
        seed: int = 0,
        sharing: Sharing | None = None,
    ) -> None:
        check_on_bad_row(on_bad_row)
        self.shards, self.collator, self.batch_size, self.on_bad_row = shards, collator, batch_size, on_bad_row
        self.base = str(shards.folder if image_folder is None else check_image_folder(image_folder))
        self.shuffle_buffer, self.bucket, self.rates, self.seed = shuffle_buffer, bucket, rates or Rates(), seed
        pool = max(1, bucket * batch_size)
        self.block_rows = -(-max(shuffle_buffer, 1) // pool) * pool
        self.sharing = sharing or Sharing()
        self.places = [dict(START) for _ in range(self.sharing.slots)]
        self.first = 0

    def __iter__(self) -> Iterator[tuple[int, Place, dict]]:
        worker = get_worker_info()
        slot = ((worker.id if worker else 0) + self.first) % self.sharing.slots
        samples: list[tuple[Any, list]] = []
        missed: list[tuple[str, BadRow]] = []
        for block, bad, place in self._blocks(self.sharing.rank * self.sharing.slots + slot, self.places[slot]):
            self._miss(missed, bad)
            for used, row in enumerate(islice(block, place["used"], None), start=place["used"] + 1):
                try:
                    sample = self.collator.encode(completed(row.row, self.base), -1)
                except BadRow as problem:
                    self._miss(missed, [(row.row["id"], problem)])
                else:
                    samples.append((sample, missed))
                    missed = []
                if len(samples) == self.batch_size or (row.ends and samples):
                    yield slot, place | {"used": used}, self.collator.pad(samples)
                    samples = []

    def first_rows(self) -> Iterator[dict[str, Any]]:
        """Yield usable rows of the first pass, the same on every rank, for measurements on a few rows."""
        for _, item in self._pass(0, 0, 0, 0):
            if isinstance(item, RawRow):
                yield completed(item.row, self.base)

    def _blocks(self, part: int, place: Place) -> Iterator[tuple[list[RawRow], list[tuple[str, BadRow]], Place]]:
        """Yield blocks from a position on, in training order, each with the bad rows found while reading it."""
        at, place = (place["epoch"], place["shard"], place["row"]), dict(place)
        while True:
            whole, empty = at[1:] == (0, 0), True
            block: list[RawRow] = []
            bad: list[tuple[str, BadRow]] = []
            for after, item in self._pass(part, *at):
                empty = False
                if isinstance(item, RawRow):
                    block.append(item)
                else:
                    bad.append(item)
                if len(block) == self.block_rows or len(bad) == GIVE_UP_AFTER:
                    yield self._ordered(block, part, place["block"]), bad, place
                    place = self._next(place, (at[0], *after))
                    block, bad = [], []
            if whole and empty:
                raise ValueError(
                    f"{self.shards.source} has no rows for part {part + 1} of {self._parts}; "
                    "use fewer workers or ranks."
                )
            if block or bad:
                yield self._ordered(block, part, place["block"]), bad, place
            at = (at[0] + 1, 0, 0)
            place = self._next(place, at)

    @property
    def _parts(self) -> int:
        return self.sharing.num_ranks * self.sharing.slots

    @staticmethod
    def _next(place: Place, at: tuple[int, int, int]) -> Place:
        return {"epoch": at[0], "shard": at[1], "row": at[2], "block": place["block"] + 1, "used": 0}

    def _pass(
        self, part: int, epoch: int, shard: int, row: int
    ) -> Iterator[tuple[tuple[int, int], RawRow | tuple[str, BadRow]]]:
        """Yield what a part reads in a pass from a row of a shard on, each with the (shard, row) that follows."""
        for turn, (index, offset, stride) in islice(enumerate(self._turns(part, epoch)), shard, None):
            name = Path(self.shards.names[index]).name
            try:
                numbered = enumerate(self.shards.read(index))
                for number, record in islice(numbered, row if turn == shard else 0, None):
                    if number % stride == offset:
                        yield (turn, number + 1), self._row(record, f"{name}:{number}")
            except Exception as error:  # file systems, archives and Arrow raise unrelated types
                yield (turn + 1, 0), (name, BadRow(f"unreadable shard: {first_line(error)}"))

    def _turns(self, part: int, epoch: int) -> list[tuple[int, int, int]]:
        """The shards of a part in a pass, as (shard, first row, stride over rows)."""
        order = list(range(len(self.shards)))
        if self.shuffle_buffer > 1:
            random.Random(f"{self.seed} {epoch}").shuffle(order)
        whole = len(order) - len(order) % self._parts
        return [(i, 0, 1) for i in order[part : whole : self._parts]] + [(i, part, self._parts) for i in order[whole:]]

    def _row(self, record: Record | BadRow, fallback: str) -> RawRow | tuple[str, BadRow]:
        """Convert a record to a row; or return its id and why it is broken."""
        if isinstance(record, BadRow):
            return fallback, record
        try:
            return RawRow(read_record(record, fallback))
        except BadRow as bad:
            return clean(str(record.get("id") or fallback)), bad

    def _ordered(self, block: list[RawRow], part: int, number: int) -> list[RawRow]:
        """Put the rows of a block in training order."""
        if self.shuffle_buffer > 1:
            random.Random(f"{self.seed} {part} {number}").shuffle(block)
        if not self.bucket:
            return block
        return _bucketed(block, self.batch_size, self.bucket, self._length, f"{self.seed} {number}")

    def _length(self, row: RawRow) -> float:
        return self.rates.length(count_characters(row.row["conversations"]), count_media(row.row))

    def _miss(self, missed: list[tuple[str, BadRow]], bad: list[tuple[str, BadRow]]) -> None:
        if bad and self.on_bad_row == "raise":
            raise bad_row_error(*bad[0])
        missed += bad
        if len(missed) >= GIVE_UP_AFTER:
            raise ValueError(
                f"{len(missed)} consecutive rows of {self.shards.source} are unusable; the last: {missed[-1][1]}."
            )


def _bucketed(
    block: list[RawRow], batch_size: int, bucket: int, length: Callable[[RawRow], float], seed: str
) -> list[RawRow]:
    """Sort pools of `bucket` batches by length, split them into batches, and shuffle the batches of each pool.

    The order of batches depends on `seed` and the position of the pool, not on the part, so that all ranks process
    long batches in the same step.
    """
    ordered: list[RawRow] = []
    for start in range(0, len(block), bucket * batch_size):
        pool = sorted(block[start : start + bucket * batch_size], key=length)
        batches = [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
        random.Random(f"{seed} {start}").shuffle(batches)
        for batch in batches:
            for row in batch:
                row.ends = row is batch[-1]
            ordered += batch
    return ordered
