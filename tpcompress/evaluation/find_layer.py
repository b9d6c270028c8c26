"""Find the first decoder layer from which a model no longer needs its vision tokens, as in VTW (arXiv 2405.05803).

For every layer K at which a stage can act, all vision tokens are withdrawn before K, and the distribution of the next
token is compared with that of the dense model: KL(dense || withdrawn) in nats, one question per image. The result is
the first layer from which on the mean KL stays below a threshold.

Differences from the paper: all later layers must be below the threshold as well, so that a local minimum is not chosen;
mean and interval are over images; the default threshold is ours. Every layer costs one prefill per sample, plus one of
the dense model. The candidates do not share the layers before K, so that the measured computation is that of `attach`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tpcompress.bundled import base_path
from tpcompress.data.rows import BadRow, open_image
from tpcompress.evaluation.layer_search import LayerScore, LayerSearch
from tpcompress.evaluation.prompt import Media, chat_inputs
from tpcompress.evaluation.tasks import Task, create_task
from tpcompress.families import resolve
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import attach, base_of, detach, is_attached
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.models import load_base, load_processor

SUFFIXES = (".yaml", ".yml", ".json")

Sample = Mapping[str, Any]
"""Processor outputs for one image and one question."""


# ---------------------------------------------------------------------------------------------------- command


def run_find_layer(
    model: str,
    data: str | None,
    image_folder: str | None,
    num_samples: int,
    threshold: float,
    layers: Sequence[int] | None,
    out: str | None,
    seed: int,
    dtype: str,
    device: str,
    console: Console,
    task: Task | str | dict[str, Any] | None = None,
) -> LayerSearch:
    """Load a model, measure every layer, print the table, and optionally write the plan.

    Args:
        model: folder of a model, hub id, or tiny_llava.
        data: chat data with one image per row; None for the built-in benchmark (bundled base only).
        image_folder: folder that relative image paths are resolved against.
        num_samples: number of images, each with one question.
        threshold: mean KL in nats that all layers from the chosen one on must be below.
        layers: candidate layers; None for all.
        out: plan file to write.
        seed: seed of the selection of rows.
        dtype, device: dtype and device of the model.
        console: console for progress and table.
        task: task whose rows are used instead of `data`.

    Raises:
        FileNotFoundError, ValueError: an argument is invalid or a file is missing; with `out`, no layer is below the
            threshold.
        KeyboardInterrupt: re-raised after the layers measured so far are printed.
    """
    if out is not None and (Path(out).suffix.lower() not in SUFFIXES or Path(out).is_dir()):
        raise ValueError(f"--out {out} is not the name of a plan file; give one such as vtw.yaml.")
    if num_samples < 1 or threshold <= 0:
        raise ValueError(f"num_samples and threshold must be above 0, got {num_samples} and {threshold:g}.")
    task = calibration_task(model, data, image_folder, num_samples, seed) if task is None else create_task(task)
    subject: Any = load_base(model, dtype)
    subject.to(device)
    samples = calibration_samples(load_processor(model), task.rows, num_samples, seed)
    candidates, depth = _candidates(subject, layers), len(resolve(subject).layers)
    search = LayerSearch((), len(samples), depth, threshold)
    try:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("", total=(len(candidates) + 1) * len(samples))
            tick = partial(progress.update, bar, advance=1)
            for score in withdrawals(subject, samples, candidates, lambda what: tick(description=what)):
                search = replace(search, scores=(score, *search.scores))
    except KeyboardInterrupt:
        search.print(console)
        done = f"{len(search.scores)} of {len(candidates)} layers (the last ones are measured first)"
        raise KeyboardInterrupt(f"Interrupted after {done}; no plan was written.") from None
    search.print(console)
    if out is not None:
        search.write(out, model)
        console.print(f"Plan: {out}", soft_wrap=True, highlight=False)
    return search


def calibration_task(model: str, data: str | None, image_folder: str | None, num_samples: int, seed: int) -> Task:
    """The task of the given chat data, else training images of the built-in benchmark for a bundled base.

    Raises:
        ValueError: no data for another base.
    """
    if data is not None:
        # Without a check of all images beforehand: only a few rows are used, and broken ones are skipped.
        return create_task({"type": "chat", "data": data, "image_folder": image_folder, "check_images": False})
    if base_path(model) == model:
        raise ValueError(
            f"find-layer requires --data for {model}: chat data such as a LLaVA JSON file, with --image_folder."
        )
    return create_task({"type": "benchmark", "num_images": num_samples, "seed": seed, "split": "train"})


def calibration_samples(processor: Any, rows: Any, num_samples: int, seed: int = 0) -> list[Sample]:
    """Take one image and one first question from each row, cycling through the questions of a row.

    Args:
        processor: processor of the model, with a chat template.
        rows: rows of a task; rows without exactly one readable image are skipped.
        num_samples: number of samples.
        seed: seed of the order of rows, if there are more rows than samples; otherwise they are taken in order.

    Raises:
        ValueError: no row is usable.
    """
    samples: list[Sample] = []
    order = range(len(rows)) if len(rows) <= num_samples else np.random.default_rng(seed).permutation(len(rows))
    for index in order:
        if len(samples) == num_samples:
            break
        row = rows[int(index)]
        if len(row["images"]) != 1:
            continue
        turns = row["conversations"][len(samples) % len(row["conversations"])]
        question = next(turn["content"] for turn in turns if turn["role"] == "user")
        try:
            samples.append(chat_inputs(processor, Media([open_image(row["images"][0])]), question))
        except BadRow:
            continue
    if not samples:
        raise ValueError(f"None of the {len(rows)} rows has exactly one readable image; give other data.")
    return samples


# ---------------------------------------------------------------------------------------------------- measuring


def withdrawals(
    model: Any, samples: Sequence[Sample], layers: Sequence[int] | None = None, tick: Callable[[str], Any] | None = None
) -> Iterator[LayerScore]:
    """Withdraw all vision tokens before one layer after the other, from the last to the first.

    Args:
        model: dense model; detached again whenever the iteration stops.
        samples: samples of `calibration_samples`.
        layers: candidate layers; None for all at which a stage can act.
        tick: callback with a description, called after every prefill.

    Raises:
        ValueError: a plan is attached, a layer does not exist, or logits are not finite.
    """
    candidates, report = _candidates(model, layers), tick or (lambda what: None)
    dense_IC = torch.stack([_next_token(model, sample, report, "the dense model") for sample in samples])
    for layer in reversed(candidates):
        attach(model, PruningPlan([Stage("vtw", layer, keep_tokens=0)]))
        try:
            cut_IC = torch.stack([_next_token(model, sample, report, f"without from {layer}") for sample in samples])
        finally:
            detach(model)
        kl_I = (dense_IC.exp() * (dense_IC - cut_IC)).sum(-1).clamp(min=0)
        same_I = dense_IC.argmax(-1) == cut_IC.argmax(-1)
        yield LayerScore.of(layer, kl_I.cpu().double().numpy(), same_I.cpu().double().numpy())


def _candidates(model: Any, layers: Sequence[int] | None) -> list[int]:
    """Candidate layers in increasing order."""
    if is_attached(model):
        raise ValueError("This model carries a plan; find-layer requires its base: detach it, or name the base model.")
    possible = resolve(base_of(model)).stage_layers
    wrong = sorted(set(layers or ()) - set(possible))
    if wrong:
        raise ValueError(
            f"No stage can act at layer {', '.join(map(str, wrong))}; choose layers from {possible[0]} to "
            f"{possible[-1]} for this model."
        )
    return sorted(set(layers)) if layers else possible


def _next_token(model: Any, sample: Sample, report: Callable[[str], Any], what: str) -> Tensor:
    """Log-probabilities (C,) of the token after the prompt, in float32."""
    with inference(model):
        logits_C = model(**inputs_for(model, sample), use_cache=False).logits[0, -1].float()
    report(what)
    if not bool(torch.isfinite(logits_C).all()):
        raise ValueError(f"The logits of {what} are not finite; check its weights, or load it in float32.")
    return logits_C.log_softmax(-1)
