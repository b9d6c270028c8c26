"""Scores a model on rows by generation: greedy answers as text, counted by metrics of text.

B questions of a batch, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tpcompress.data.blank import blank_images
from tpcompress.data.collate import ChatCollator, PromptCollator
from tpcompress.data.rows import BadRow
from tpcompress.data.video import VideoSampling
from tpcompress.evaluation.scoring.batches import Asked, Prepared, Rows, Skipped, batched, families_of, source_of
from tpcompress.evaluation.scoring.evaluate import Watch, moved
from tpcompress.evaluation.scoring.metrics import Reply
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.sums import AnswerSums
from tpcompress.inference import inference
from tpcompress.insertion.attach import is_attached, record


@dataclass(frozen=True)
class Generation:
    """How answers are generated; always greedy.

    Attributes:
        max_new_tokens: longest answer; None for the longest reference of each batch and its end.
        batch_size: questions per call.
        stop: texts at which an answer ends, and which are not part of it.

    Raises:
        ValueError: a value that is not possible.
    """

    max_new_tokens: int | None = 64
    batch_size: int = 16
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if (value is not None or name == "batch_size") and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"generate.{name} must be a whole number of at least 1, got {value!r}.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"generate.stop is a list of texts, got {self.stop!r}.")
        object.__setattr__(self, "stop", stop)

    @classmethod
    def of(cls, values: Any) -> Generation:
        """Settings from a mapping; `true` takes the defaults.

        Raises:
            ValueError: an unknown setting, or a value that is not possible.
        """
        if isinstance(values, cls):
            return values
        given = {} if values is True else values
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise ValueError(f"generate is a mapping with {', '.join(known)}, got {values!r}.")
        return cls(**given)

    def config(self) -> dict[str, Any]:
        """Plain values; `of` is the inverse."""
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "stop": list(self.stop)}


def evaluate_by_generation(
    model: Any,
    processor: Any,
    dataset: Rows | Prepared,
    *,
    generation: Generation | None = None,
    blank: bool = False,
    learnt: Sequence[str] | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    video: VideoSampling | None = None,
    metric: str = "exact_match",
) -> Scores:
    """Score the greedy answers of a model, pruned as attached, to every conversation of a data set.

    Args:
        model, processor, blank, learnt, progress, watch, video: as in `evaluate`.
        dataset: rows, or the output of `prepare_prompts`.
        generation: settings; default: as many tokens as the longest reference of each batch needs.
        metric: metric of the score; those beside it and exact match are measured, too.

    Raises:
        ValueError: no row is usable, or the metric is unknown or does not read text.
    """
    settings = Generation(max_new_tokens=None, batch_size=64) if generation is None else generation
    collator = PromptCollator(processor, video=video)
    if isinstance(dataset, Prepared):
        source, families, num_images = source_of(dataset), dataset.families, dataset.num_images
        skipped = Skipped(dataset.skipped)
    else:
        families, num_images, skipped, rows = families_of(dataset), len(dataset), Skipped(), dataset
        source = lambda: batched(collator, rows, settings.batch_size, skipped, blank_images if blank else None)  # noqa: E731
    sums = AnswerSums(families, num_images, metric, generated=True)
    writer = _Writer(model, processor, collator.pad_id, settings, watch)
    task = None if progress is None else progress.add_task("generating", total=num_images)
    with inference(model):
        for batch, asked in source():
            meta = batch["meta"]
            texts, confidence = writer(batch, asked)
            names = [name for listed in meta.families for name in listed]
            replies = [Reply(t, a.references, a.prompt, n) for t, a, n in zip(texts, asked, names, strict=True)]
            sums.add_replies(meta.rows, replies, confidence)
            if progress is not None and task is not None:
                progress.update(task, completed=max(meta.rows) + 1)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return sums.scores(learnt, skipped.check(num_images))


class _Writer:
    """Generates the answers of a batch."""

    def __init__(self, model: Any, processor: Any, pad_id: int, settings: Generation, watch: Watch | None) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.settings, self.pad_id, self.watch = settings, pad_id, watch
        self.ends = end_tokens(model, processor)

    def __call__(self, batch: dict[str, Any], asked: Sequence[Asked]) -> tuple[list[str], np.ndarray]:
        """Texts, and the probability of each."""
        settings, best = self.settings, _BestProbability()
        options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens or self._longest(asked)}
        if settings.stop:
            stops = Stops(self.tokenizer, settings.stop, batch["input_ids"].shape[1])
            options["stopping_criteria"] = StoppingCriteriaList([stops])
        call = {
            **moved(batch, self.model), **options, "do_sample": False, "num_beams": 1, "pad_token_id": self.pad_id,
            "eos_token_id": sorted(self.ends), "logits_processor": LogitsProcessorList([best]),
        }  # fmt: skip
        if is_attached(self.model):
            with record(self.model) as trace:
                out = self.model.generate(**call)
            if self.watch is not None:
                self.watch(trace, batch["meta"])
        else:
            out = self.model.generate(**call)
        new = out[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = torch.isin(new, torch.tensor(sorted(self.ends), device=new.device))
        said = (ended.cumsum(1) - ended.long()) == 0  # up to the end token, which counts
        logs = torch.stack(best.logs, 1)[:, : new.shape[1]]
        return [cut(text, settings.stop) for text in texts], (logs * said.cpu()).sum(1).exp().numpy()

    def _longest(self, asked: Sequence[Asked]) -> int:
        references = [text for question in asked for text in question.references]
        return max(len(ids) for ids in self.tokenizer(references, add_special_tokens=False)["input_ids"]) + 2


def cut(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first text that ends it, without blanks around it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)].strip() if places else text.strip()


class _BestProbability(LogitsProcessor):
    """Keeps the log-probability of the most likely token of every step; changes nothing."""

    def __init__(self) -> None:
        self.logs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Called by `generate` in every step."""
        self.logs.append(scores.float().log_softmax(-1).amax(-1).cpu())
        return scores


class Stops(StoppingCriteria):
    """Ends answers that contain a text. That of transformers (`stop_strings`) refuses tokenizers of whole words."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.stops, self.prompt = tokenizer, stops, prompt

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """bool (B,): which answers are at their end."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


def end_tokens(model: Any, processor: Any) -> set[int]:
    """Tokens that end an answer: those of the model, of the tokenizer, and the last label of a training sequence."""
    ends = {processor.tokenizer.eos_token_id}
    configured = getattr(model, "generation_config", None)
    listed = None if configured is None else configured.eos_token_id
    ends |= set(listed) if isinstance(listed, list | tuple) else {listed}
    sample = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        row = {"images": [], "conversations": [sample], "families": [""]}
        labels = ChatCollator(processor).encode(row)[0].labels
        ends.add(next(label for label in reversed(labels) if label != -100))
    except BadRow:  # a template that cannot render a question without an image
        pass
    return ends - {None}
