"""Batches of a test: rows collated for teacher forcing or for generation, with what each question asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tpcompress.data.collate import Batch, ChatCollator, PromptCollator
from tpcompress.data.rows import BadRow
from tpcompress.data.video import VideoSampling
from tpcompress.evaluation.scoring.metrics import Reply, find_metric

Change = Callable[[dict[str, Any]], dict[str, Any]]
"""A row before it is collated to the row that is collated."""


class Rows(Protocol):
    """A `datasets.Dataset` of rows, a list of them, or anything else with a length and an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        references: right answers: those of the row's `references`, else its last assistant turn.
        prompt: the last turn before the answer.
    """

    references: tuple[str, ...]
    prompt: str


@dataclass(frozen=True)
class Prepared:
    """A data set collated into batches once, for scoring many models on it.

    Attributes:
        batches: batches of the collator.
        families: question families that occur.
        num_images: rows of the data set.
        packed: all questions about an image share its sequence.
        skipped: number of broken rows.
        asked: the questions of each batch, for generation; empty for teacher forcing.
    """

    batches: list[Batch]
    families: tuple[str, ...]
    num_images: int
    packed: bool
    skipped: int
    asked: list[list[Asked]] = field(default_factory=list)


class Skipped:
    """Counts broken rows while a data set is read."""

    def __init__(self, count: int = 0) -> None:
        self.count, self.last = count, ""

    def check(self, num_images: int) -> int:
        """The number of broken rows.

        Raises:
            ValueError: all of them are.
        """
        if self.count == num_images:
            raise ValueError(f"None of the {num_images} rows can be evaluated; the last one: {self.last or 'no row'}.")
        return self.count


def prepare(
    processor: Any,
    dataset: Rows,
    *,
    batch_size: int = 64,
    pack: bool = True,
    change: Change | None = None,
    video: VideoSampling | None = None,
) -> Prepared:
    """Collate a data set once, for teacher forcing.

    Args:
        processor: processor of the model.
        dataset: rows.
        batch_size: sequences per batch.
        pack: one sequence per image instead of one per question; not for plans that read the prompt.
        change: applied to every row before it is collated, such as `blank_images`.
        video: how videos are sampled.

    Raises:
        ValueError: no row is usable.
    """
    skipped = Skipped()
    batches = [
        batch
        for batch, _ in batched(ChatCollator(processor, pack=pack, video=video), dataset, batch_size, skipped, change)
    ]
    return Prepared(batches, families_of(dataset), len(dataset), pack, skipped.check(len(dataset)))


def prepare_prompts(
    processor: Any,
    dataset: Rows,
    *,
    batch_size: int = 16,
    change: Change | None = None,
    video: VideoSampling | None = None,
) -> Prepared:
    """Collate the questions of a data set once, for generation.

    Args:
        processor, dataset, change, video: as in `prepare`.
        batch_size: questions per batch.

    Raises:
        ValueError: no row is usable.
    """
    skipped = Skipped()
    found = list(batched(PromptCollator(processor, video=video), dataset, batch_size, skipped, change))
    batches, asked = [batch for batch, _ in found], [questions for _, questions in found]
    return Prepared(batches, families_of(dataset), len(dataset), False, skipped.check(len(dataset)), asked)


def batched(
    collator: ChatCollator | PromptCollator,
    dataset: Rows,
    batch_size: int,
    skipped: Skipped,
    change: Change | None = None,
) -> Iterator[tuple[Batch, list[Asked]]]:
    """Batches of at most `batch_size` sequences, in the order of the rows, and the questions of each.

    Packed sequences hold several questions, which are not given. `change` is applied to every row before it is
    collated, which leaves its questions as they are.
    """
    waiting: list[tuple[Any, Asked | None]] = []

    def take(number: int) -> tuple[Batch, list[Asked]]:
        sequences = [sequence for sequence, _ in waiting[:number]]
        asked = [question for _, question in waiting[:number] if question is not None]
        del waiting[:number]
        return collator.pad([(sequences, [])]), asked

    for index in range(len(dataset)):
        row = dict(dataset[index])
        try:
            sequences = collator.encode(row if change is None else change(row), index)
        except BadRow as bad:
            skipped.count, skipped.last = skipped.count + 1, str(bad)
            continue
        questions = questions_of(row)
        alone = len(sequences) == len(questions)
        waiting += zip(sequences, questions if alone else [None] * len(sequences), strict=True)
        while len(waiting) >= batch_size:
            yield take(batch_size)
    if waiting:
        yield take(len(waiting))


def questions_of(row: Mapping[str, Any]) -> list[Asked]:
    """Question and references of every conversation of a row."""
    listed = row.get("references") or [None] * len(row["conversations"])
    found = []
    for messages, references in zip(row["conversations"], listed, strict=True):
        prompt = next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), "")
        found.append(Asked(tuple(references or ()) or (messages[-1]["content"],), prompt))
    return found


def check_applies(metric: str, counted: int, dataset: Rows, data: str) -> None:
    """Refuse a metric that applies to no question, whatever is answered.

    Args:
        metric: name of the metric.
        counted: questions that counted with the answers of a model.
        dataset: rows.
        data: the rows in words.

    Raises:
        ValueError: it applies to none of them.
    """
    if counted:
        return
    found, right = find_metric(metric), list[Reply]()
    for row in (dataset[index] for index in range(len(dataset))):
        for asked, family in zip(questions_of(row), row["families"], strict=True):
            right.append(Reply(asked.references[0], asked.references, asked.prompt, family))
    # A ratio such as precision may have nothing to count in the answers of one model, though it applies.
    if found.reads_text and any(
        not np.isnan(found.aggregate(*np.array(found.of_reply(reply), dtype=float))) for reply in right
    ):
        return
    why = f": no reference is {found.applies_to}" if found.applies_to else ""
    raise ValueError(
        f"Metric {metric} applies to none of the {len(right)} questions of {data}{why}; choose another metric "
        f"(tpcompress list metrics)."
    )


def families_of(dataset: Rows) -> tuple[str, ...]:
    """Families of a data set, sorted."""
    return tuple(sorted({name for listed in _column(dataset, "families") for name in listed}))


def has_several_questions(dataset: Rows) -> bool:
    """Whether a row has more than one conversation."""
    return any(len(listed) > 1 for listed in _column(dataset, "families"))


def _column(dataset: Any, name: str) -> list[list[str]]:
    """One column, without decoding the images beside it."""
    if name in getattr(dataset, "column_names", ()):  # chat rows make some of their columns on access
        return list(dataset[name])
    return [row[name] for row in dataset]


Source = Callable[[], Iterator[tuple[Batch, list[Asked]]]]


def source_of(prepared: Prepared) -> Source:
    """The batches of a prepared data set, as `batched` gives them."""
    return lambda: iter(zip(prepared.batches, prepared.asked or [[] for _ in prepared.batches], strict=True))
