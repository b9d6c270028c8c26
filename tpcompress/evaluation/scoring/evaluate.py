"""Scores a model on rows by teacher forcing: all answers in one forward pass.

Greedy decoding gives the reference answer exactly if every answer token is the argmax given the reference tokens before
it, so closed answers need no generate loop. Open answers do, see `scoring.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tpcompress.data.blank import blank_images
from tpcompress.data.collate import Batch, BatchMeta, ChatCollator
from tpcompress.data.packing import why_config_not_packed
from tpcompress.data.video import VideoSampling
from tpcompress.evaluation.scoring.batches import (
    Prepared,
    Rows,
    Skipped,
    batched,
    families_of,
    has_several_questions,
    prepare,
    source_of,
)
from tpcompress.evaluation.scoring.scores import Scores, learnt_families
from tpcompress.evaluation.scoring.sums import AnswerSums
from tpcompress.inference import inference
from tpcompress.insertion.attach import base_of, is_attached, plan_of, record
from tpcompress.insertion.trace import Trace

__all__ = ["Prepared", "Rows", "Scores", "evaluate", "learnt_families", "prepare", "why_not_packed"]

Watch = Callable[[Trace, BatchMeta], None]
"""Callback: the record of a batch, and the metadata of the batch."""


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
    video: VideoSampling | None = None,
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
        blank: replace images by blank ones: the blank baseline; not for prepared rows, which are blank already or not.
        learnt: families that the score averages; default: all.
        progress: rich progress display to report to.
        watch: callback for the record of the stages of an attached plan, batch by batch.
        video: how videos are sampled.
        metric: metric of the score. All metrics of logits are measured, see `Scores.with_metric`.

    Raises:
        ValueError: no row is usable, packing where it would change the answers, unknown metric, or logits that are not
            finite.
    """
    if isinstance(dataset, Prepared):
        source, families, num_images = source_of(dataset), dataset.families, dataset.num_images
        skipped, packed = Skipped(dataset.skipped), dataset.packed
    else:
        families, num_images, skipped = families_of(dataset), len(dataset), Skipped()
        fits = has_several_questions(dataset) and why_not_packed(model, processor) is None
        packed = fits if pack is None else pack
        collator, rows = ChatCollator(processor, pack=packed, video=video), dataset
        source = lambda: batched(collator, rows, batch_size, skipped, blank_images if blank else None)  # noqa: E731
    reason = why_not_packed(model, processor) if packed else None
    if reason is not None:
        raise ValueError(f"Questions cannot share a sequence here: {reason}; evaluate with pack=False.")
    sums = AnswerSums(families, num_images, metric)
    task = None if progress is None else progress.add_task("evaluating", total=num_images)
    with inference(model):
        for batch, _ in source():
            logits_BNC, labels_BN = _forward(model, batch, watch)
            sums.update(logits_BNC, labels_BN, batch["labels"], batch["meta"])
            if progress is not None and task is not None:
                progress.update(task, completed=max(batch["meta"].rows) + 1)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return sums.scores(learnt, skipped.check(num_images))


def why_not_packed(model: nn.Module, processor: Any) -> str | None:
    """Why questions about an image cannot share its sequence; None if they can."""
    if is_attached(model) and plan_of(model).reads_prompt:
        return "a pruner of the attached plan reads the prompt"
    return why_never_packed(model, processor)


def why_never_packed(model: nn.Module, processor: Any) -> str | None:
    """Why questions cannot share a sequence in this model, whatever its plan; None if they can."""
    config = base_of(model).config
    attention = config.get_text_config()._attn_implementation
    if attention != "sdpa":
        return f"attention '{attention}' does not take their mask, only sdpa does"
    if (reason := why_config_not_packed(config)) is not None:
        return reason
    try:
        ChatCollator(processor, pack=True)
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def moved(batch: Batch, model: nn.Module) -> Batch:
    """The model's inputs on its device."""
    device = next(model.parameters()).device
    inputs = {key: value for key, value in batch.items() if key != "meta"}
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in inputs.items()}


def _forward(model: nn.Module, batch: Batch, watch: Watch | None) -> tuple[Tensor, Tensor]:
    """Logits and the labels of the same tokens. Labels are passed in because they mark the end of the prompt."""
    inputs = moved(batch, model)
    if not is_attached(model):
        labels = inputs.pop("labels")
        return model(**inputs, use_cache=False).logits, labels
    with record(model) as trace:
        logits = model(**inputs, use_cache=False).logits
    if watch is not None:
        watch(trace, batch["meta"])
    return logits, inputs["labels"] if trace.labels_BN is None else trace.labels_BN
