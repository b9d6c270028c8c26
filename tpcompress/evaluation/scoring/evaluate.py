"""Scores a model on rows: teacher-forced answers in one forward pass, and generation as the slow check of it.

Greedy decoding gives the reference answer exactly if every answer token is the argmax given the reference tokens before
it, so no generate loop is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tpcompress.data.collate import Batch, BatchMeta, ChatCollator, PromptCollator
from tpcompress.data.rows import BadRow
from tpcompress.evaluation.scoring.scores import Scores, learnt_families
from tpcompress.evaluation.scoring.sums import AnswerSums
from tpcompress.inference import inference
from tpcompress.insertion.attach import base_of, is_attached, plan_of, record
from tpcompress.insertion.trace import Trace

__all__ = ["Prepared", "Scores", "evaluate", "evaluate_by_generation", "learnt_families", "prepare"]


class Rows(Protocol):
    """A `datasets.Dataset` of rows, a list of them, or anything else with a length and an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Watch = Callable[[Trace, BatchMeta], None]
"""Callback: the record of a batch, and the metadata of the batch."""


@dataclass(frozen=True)
class Prepared:
    """A data set collated into batches once, for scoring many models on it.

    Attributes:
        batches: batches of the collator.
        families: question families that occur.
        num_images: rows of the data set.
        packed: all questions about an image share its sequence.
        skipped: number of broken rows.
    """

    batches: list[Batch]
    families: tuple[str, ...]
    num_images: int
    packed: bool
    skipped: int


def prepare(processor: Any, dataset: Rows, *, batch_size: int = 64, pack: bool = True) -> Prepared:
    """Collate a data set once.

    Args:
        processor: processor of the model.
        dataset: rows.
        batch_size: sequences per batch.
        pack: one sequence per image instead of one per question; not for plans that read the prompt.

    Raises:
        ValueError: no row is usable.
    """
    collator, skipped = ChatCollator(processor, pack=pack), _Skipped()
    batches = list(_batches(collator, dataset, batch_size, skipped))
    return Prepared(batches, _families(dataset), len(dataset), pack, skipped.check(len(dataset)))


def evaluate(
    model: nn.Module,
    processor: Any,
    dataset: Rows | Prepared,
    *,
    batch_size: int = 64,
    pack: bool | None = None,
    blank: bool = False,
    learnt: Sequence[str] | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    metric: str = "accuracy",
) -> Scores:
    """Score a model, pruned as attached, on every conversation of a data set.

    Args:
        model: dense, attached or exported; its train/eval modes are restored afterwards.
        processor: processor of the model.
        dataset: rows, or the output of `prepare`.
        batch_size: sequences per forward call: images if packed, questions if not.
        pack: all questions about an image in one sequence. Default: where it saves time and gives the same answers:
            several questions per image, sdpa attention, no pruner that reads the prompt.
        blank: replace images by their mean (zeros after normalisation): the blank baseline.
        learnt: families that the score averages; default: all.
        progress: rich progress display to report to.
        watch: callback for the record of the stages of an attached plan, batch by batch.
        metric: metric of the score. All metrics are measured, see `Scores.with_metric`.

    Raises:
        ValueError: no row is usable, packing where it would change the answers, unknown metric, or logits that are not
            finite.
    """
    if isinstance(dataset, Prepared):
        source: Callable[[], Iterator[Batch]] = lambda: iter(dataset.batches)  # noqa: E731
        families, num_images, packed = dataset.families, dataset.num_images, dataset.packed
        skipped = _Skipped(dataset.skipped)
        _check_packing(model, packed)
    else:
        families, num_images, skipped = _families(dataset), len(dataset), _Skipped()
        packed = _choose_packing(model, dataset) if pack is None else pack
        _check_packing(model, packed)
        collator = ChatCollator(processor, pack=packed)
        source = lambda: _batches(collator, dataset, batch_size, skipped)  # noqa: E731
    sums = AnswerSums(families, num_images, metric).to(_device(model))
    task = None if progress is None else progress.add_task("evaluating", total=num_images)
    with inference(model):
        for batch in source():
            logits_BNC, labels_BN = _forward(model, batch, blank, watch)
            sums.update(logits_BNC, labels_BN, batch["labels"], batch["meta"])
            if progress is not None and task is not None:
                progress.update(task, completed=max(batch["meta"].rows) + 1)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return sums.scores(learnt, skipped.check(num_images))


def evaluate_by_generation(
    model: Any,
    processor: Any,
    dataset: Rows,
    *,
    batch_size: int = 64,
    blank: bool = False,
    learnt: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
) -> Scores:
    """Exact match by greedy `generate`: slow, and an independent check of `evaluate`.

    Args:
        model, processor, dataset, blank, learnt: as in `evaluate`.
        batch_size: questions per call.
        max_new_tokens: default: enough for the longest reference answer of each batch and its end token.

    Raises:
        ValueError: no row is usable.
    """
    tokenizer, collator, skipped = processor.tokenizer, PromptCollator(processor), _Skipped()
    sums = AnswerSums(_families(dataset), len(dataset), "accuracy").to(_device(model))
    ends: set[int] | None = None
    with inference(model):
        for batch in _batches(collator, dataset, batch_size, skipped):
            meta: BatchMeta = batch.pop("meta")
            if ends is None:
                ends = _end_tokens(processor, dataset[meta.rows[0]])
            answers = [answer for listed in meta.answers for answer in listed]
            longest = max(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"])
            out = model.generate(
                **_moved(batch, model, blank),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens or longest + 2,
                eos_token_id=sorted(ends),
                pad_token_id=collator.pad_id,
            )
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            right_Q = torch.tensor(
                [text.split() == answer.split() for text, answer in zip(texts, answers, strict=True)]
            )
            counted = (right_Q, torch.ones(len(right_Q)))
            sums.add(meta, {"accuracy": counted, "exact_match": counted})
    return sums.scores(learnt, skipped.check(len(dataset)))


# ---------------------------------------------------------------------------------------------------- data


class _Skipped:
    """Counts broken rows while a data set is read."""

    def __init__(self, count: int = 0) -> None:
        self.count, self.last = count, ""

    def check(self, num_images: int) -> int:
        if self.count == num_images:
            raise ValueError(f"None of the {num_images} rows can be evaluated; the last one: {self.last or 'no row'}.")
        return self.count


def _batches(
    collator: ChatCollator | PromptCollator, dataset: Rows, batch_size: int, skipped: _Skipped
) -> Iterator[Batch]:
    """Batches of at most `batch_size` sequences, in the order of the rows."""
    waiting: list[Any] = []
    for index in range(len(dataset)):
        try:
            waiting += collator.encode(dict(dataset[index]), index)
        except BadRow as bad:
            skipped.count, skipped.last = skipped.count + 1, str(bad)
        while len(waiting) >= batch_size:
            yield collator.pad([(waiting[:batch_size], [])])
            waiting = waiting[batch_size:]
    if waiting:
        yield collator.pad([(waiting, [])])


def _families(dataset: Rows) -> tuple[str, ...]:
    """Families of a data set, sorted."""
    return tuple(sorted({name for listed in _column(dataset, "families") for name in listed}))


def _column(dataset: Any, name: str) -> list[list[str]]:
    """One column, without decoding the images beside it."""
    if name in getattr(dataset, "column_names", ()):  # chat rows make some of their columns on access
        return list(dataset[name])
    return [row[name] for row in dataset]


def _end_tokens(processor: Any, row: Mapping[str, Any]) -> set[int]:
    """Tokens that end an answer: the last label of a training sequence, and the tokenizer's end token."""
    labels = ChatCollator(processor).encode(dict(row))[0].labels
    last = next(label for label in reversed(labels) if label != -100)
    eos = processor.tokenizer.eos_token_id
    return {last} if eos is None else {last, eos}


# ---------------------------------------------------------------------------------------------------- model


def _choose_packing(model: nn.Module, dataset: Rows) -> bool:
    several = any(len(listed) > 1 for listed in _column(dataset, "families"))
    return several and _why_not_packed(model) is None


def _check_packing(model: nn.Module, packed: bool) -> None:
    reason = _why_not_packed(model) if packed else None
    if reason is not None:
        raise ValueError(f"Questions cannot share a sequence here: {reason}; evaluate with pack=False.")


def _why_not_packed(model: nn.Module) -> str | None:
    if is_attached(model) and plan_of(model).reads_prompt:
        return "a pruner of the attached plan reads the prompt"
    attention = base_of(model).config.get_text_config()._attn_implementation
    return None if attention == "sdpa" else f"attention '{attention}' does not take their mask, only sdpa does"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _moved(batch: Batch, model: nn.Module, blank: bool) -> Batch:
    """The model's inputs on its device. Images are the only floating-point inputs of a collator."""
    inputs = {key: value for key, value in batch.items() if key != "meta"}
    if blank:
        inputs = {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in inputs.items()}
    device = _device(model)
    return {key: value.to(device, non_blocking=True) for key, value in inputs.items()}


def _forward(model: nn.Module, batch: Batch, blank: bool, watch: Watch | None) -> tuple[Tensor, Tensor]:
    """Logits and the labels of the same tokens. Labels are passed in because they mark the end of the prompt."""
    inputs = _moved(batch, model, blank)
    if not is_attached(model):
        labels = inputs.pop("labels")
        return model(**inputs, use_cache=False).logits, labels
    with record(model) as trace:
        logits = model(**inputs, use_cache=False).logits
    if watch is not None:
        watch(trace, batch["meta"])
    return logits, inputs["labels"] if trace.labels_BN is None else trace.labels_BN
