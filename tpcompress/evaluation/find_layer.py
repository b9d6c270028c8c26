"""From which layer on a model no longer needs its vision tokens: VTW's choice of K (arXiv 2405.05803).

For every layer K that a stage may act at, all vision tokens leave before it, and the distribution of the next token
behind the prompt is held against that of the whole model: KL(whole || withdrawn), in nats, one question per image. The
answer is the first layer from which on the mean stays under a threshold.

Unlike the paper: every later layer must stay under the threshold, too, so that a dip is not taken for the end; mean
and interval are over images, and the default threshold is ours. Each layer is one prefill of every sample, and one
more is the whole model's. The layers before K could be shared between the candidates; they are not, so that what is
measured is what `attach` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from tpcompress.bundled import base_path
from tpcompress.data.benchmark import load_benchmark
from tpcompress.data.chat import load_chat
from tpcompress.data.rows import BadRow, open_image
from tpcompress.evaluation.inspect import chat_inputs
from tpcompress.families import resolve
from tpcompress.files import write_atomic
from tpcompress.inference import inference
from tpcompress.insertion.attach import attach, base_of, detach, is_attached
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.models import load_base, load_processor

THRESHOLD = 0.01
"""Nats; ours. Total variation is then at most 7 % (Pinsker): of 100 next tokens drawn, 7 may differ."""
DRAWS = 1000
ENDINGS = (".yaml", ".yml", ".json")

Sample = Mapping[str, Any]
"""Inputs of a model for one picture and one question, as the processor made them."""


@dataclass(frozen=True)
class LayerScore:
    """What withdrawing before one layer changes.

    Attributes:
        layer: the first that sees no vision token.
        kl: mean KL(whole || withdrawn) of the next token, in nats.
        low, high: its 95 % interval: percentile bootstrap over samples.
        agreement: share of samples whose most probable next token is the same.
    """

    layer: int
    kl: float
    low: float
    high: float
    agreement: float

    @classmethod
    def of(cls, layer: int, kl_I: np.ndarray, same_I: np.ndarray) -> LayerScore:
        """From the divergence and the agreement of each sample."""
        weights_WI = np.random.default_rng(0).multinomial(len(kl_I), np.full(len(kl_I), 1 / len(kl_I)), size=DRAWS)
        low, high = np.quantile(weights_WI @ kl_I / len(kl_I), [0.025, 0.975])
        return cls(layer, float(kl_I.mean()), float(low), float(high), float(same_I.mean()))


@dataclass(frozen=True)
class LayerSearch:
    """The layers of a model, measured.

    Attributes:
        scores: by rising layer; as many as were measured before an interruption, the deepest first.
        num_samples: pictures, each with one question.
        depth: decoder layers of the model.
        threshold: in nats.
    """

    scores: tuple[LayerScore, ...]
    num_samples: int
    depth: int
    threshold: float = THRESHOLD

    @property
    def chosen(self) -> int | None:
        """The first layer from which on every measured mean is under the threshold; None if not even the last is."""
        found = None
        for score in reversed(self.scores):
            if score.kl >= self.threshold:
                break
            found = score.layer
        return found

    def plan(self) -> PruningPlan:
        """The plan that withdraws there.

        Raises:
            ValueError: no layer is under the threshold.
        """
        if self.chosen is None:
            least = f"; the last one has {self.scores[-1].kl:.2g}" if self.scores else ""
            raise ValueError(
                f"No layer stays under {self.threshold:g} nats{least}: this model reads its picture to the end. Keep "
                f"some tokens instead (tpcompress pruners), or raise the threshold."
            )
        return PruningPlan([Stage("vtw", self.chosen, keep_tokens=0)])

    def print(self, console: Console) -> None:
        """A table of the layers, and the choice."""
        table = Table(title=f"All vision tokens leave before a layer ({self.num_samples} samples)")
        for name in ("layer", "mean KL (nats)", "95 % interval", "same next token", ""):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for score in self.scores:
            mark = "chosen" if score.layer == self.chosen else "" if score.kl < self.threshold else "over"
            interval = f"{score.low:.2g} to {score.high:.2g}"
            table.add_row(str(score.layer), f"{score.kl:.3g}", interval, f"{100 * score.agreement:.0f} %", mark)
        console.print(table)
        said = f"No layer stays under {self.threshold:g} nats."
        if self.chosen is not None:
            said = f"From layer {self.chosen} of {self.depth} on, the mean stays under {self.threshold:g} nats."
        console.print(said, soft_wrap=True, highlight=False)

    def write(self, path: str | Path, model: str) -> None:
        """Write the plan; a reader never sees half a file.

        Args:
            path: ends in .yaml, .yml or .json; its folder is made.
            model: whose plan it is.

        Raises:
            ValueError: no layer is under the threshold.
        """
        path, plan = Path(path), self.plan()
        (score,) = (score for score in self.scores if score.layer == self.chosen)
        head = (
            f"# {model}: all vision tokens leave before layer {score.layer} of {self.depth}, where the next token's KL"
        )
        head += f" to the\n# whole model is {score.kl:.2g} nats on average over {self.num_samples} samples"
        head += f" (threshold {self.threshold:g}).\n"
        write_atomic(path, plan.to_json() if path.suffix == ".json" else head + plan.to_yaml())


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
) -> LayerSearch:
    """Load, measure every layer, print the table, and write the plan if one is asked for.

    Args:
        model: folder of a model, a hub id, or tiny_llava.
        data: chat data with one picture per row; None is the built-in benchmark, for a bundled base.
        image_folder: what relative image paths start from.
        num_samples: pictures, each with one question.
        threshold: mean KL in nats that a layer must stay under.
        layers: candidates; None for all.
        out: plan file to write.
        seed: which rows are drawn.
        dtype, device: of the model.
        console: where progress and table go.

    Raises:
        FileNotFoundError, ValueError: anything of it is missing or impossible, in one line; with `out`, no layer is
            under the threshold.
        KeyboardInterrupt: as it came, after the layers measured so far were printed.
    """
    if out is not None and (Path(out).suffix.lower() not in ENDINGS or Path(out).is_dir()):
        raise ValueError(f"--out {out} is no name of a plan file; give one such as vtw.yaml.")
    if num_samples < 1 or threshold <= 0:
        raise ValueError(f"num_samples and threshold must be above 0, got {num_samples} and {threshold:g}.")
    rows = _rows(model, data, image_folder, num_samples, seed)
    subject: Any = load_base(model, dtype)
    subject.to(device)
    samples = calibration_samples(load_processor(model), rows, num_samples)
    candidates, depth = _candidates(subject, layers), len(resolve(subject).layers)
    search = LayerSearch((), len(samples), depth, threshold)
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=(len(candidates) + 1) * len(samples))
            tick = partial(progress.update, task, advance=1)
            for score in withdrawals(subject, samples, candidates, lambda what: tick(description=what)):
                search = replace(search, scores=(score, *search.scores))
    except KeyboardInterrupt:
        search.print(console)
        done = f"{len(search.scores)} of {len(candidates)} layers, the deepest first"
        raise KeyboardInterrupt(f"Interrupted after {done}; no plan was written.") from None
    search.print(console)
    if out is not None:
        search.write(out, model)
        console.print(f"Plan: {out}", soft_wrap=True, highlight=False)
    return search


def withdrawals(
    model: Any, samples: Sequence[Sample], layers: Sequence[int] | None = None, tick: Callable[[str], Any] | None = None
) -> Iterator[LayerScore]:
    """Withdraw before one layer after the other, the deepest first: those that may be chosen come at once.

    Args:
        model: dense; whenever this stops, it is again.
        samples: of `calibration_samples`.
        layers: candidates; None for all that a stage may act at.
        tick: called after every prefill, with what it was of.

    Raises:
        ValueError: a plan is attached, no such layer, or logits that are not finite.
    """
    candidates, say = _candidates(model, layers), tick or (lambda what: None)
    whole_IC = torch.stack([_next_token(model, sample, say, "the whole model") for sample in samples])
    for layer in reversed(candidates):
        attach(model, PruningPlan([Stage("vtw", layer, keep_tokens=0)]))
        try:
            less_IC = torch.stack([_next_token(model, sample, say, f"without from {layer}") for sample in samples])
        finally:
            detach(model)
        kl_I = (whole_IC.exp() * (whole_IC - less_IC)).sum(-1).clamp(min=0)
        same_I = whole_IC.argmax(-1) == less_IC.argmax(-1)
        yield LayerScore.of(layer, kl_I.cpu().double().numpy(), same_I.cpu().double().numpy())


def calibration_samples(processor: Any, rows: Any, num_samples: int) -> list[Sample]:
    """One picture and one first question from each row, the questions of a row taken in turn.

    Args:
        processor: of the model, with a chat template.
        rows: rows of `tpcompress.data`; those without exactly one picture, or whose picture is broken, are passed over.
        num_samples: how many to take.

    Raises:
        ValueError: no row will do.
    """
    samples: list[Sample] = []
    for index in range(len(rows)):
        if len(samples) == num_samples:
            break
        row = rows[index]
        if len(row["images"]) != 1:
            continue
        turns = row["conversations"][len(samples) % len(row["conversations"])]
        question = next(turn["content"] for turn in turns if turn["role"] == "user")
        try:
            samples.append(chat_inputs(processor, open_image(row["images"][0]), question))
        except BadRow:
            continue
    if not samples:
        raise ValueError(f"None of the {len(rows)} rows has exactly one picture that can be read; give other data.")
    return samples


def _rows(model: str, data: str | None, image_folder: str | None, num_samples: int, seed: int) -> Any:
    """Calibration data in the order in which rows are taken."""
    if data is not None:
        return load_chat(data, image_folder, check_images=False)[0].shuffle(seed)
    if base_path(model) == model:
        raise ValueError(
            f"find-layer needs --data for {model}: chat data such as a LLaVA JSON file, with --image_folder."
        )
    return load_benchmark("train", num_samples, seed)


def _candidates(model: Any, layers: Sequence[int] | None) -> list[int]:
    """Layers to try, rising."""
    if is_attached(model):
        raise ValueError("This model carries a plan; find-layer needs its base: detach it, or name the base model.")
    possible = resolve(base_of(model)).stage_layers
    wrong = sorted(set(layers or ()) - set(possible))
    if wrong:
        raise ValueError(
            f"No stage can act at layer {', '.join(map(str, wrong))}; this model has layers {possible[0]} to "
            f"{possible[-1]} for it."
        )
    return sorted(set(layers)) if layers else possible


def _next_token(model: Any, sample: Sample, say: Callable[[str], Any], what: str) -> Tensor:
    """Log-probabilities (C,) of the token behind the prompt, in float32."""
    weight = next(model.parameters())
    inputs = {
        name: x.to(weight.device, weight.dtype if x.is_floating_point() else None) if torch.is_tensor(x) else x
        for name, x in sample.items()
    }
    with inference(model):
        logits_C = model(**inputs, use_cache=False).logits[0, -1].float()
    say(what)
    if not bool(torch.isfinite(logits_C).all()):
        raise ValueError(f"The logits of {what} are not finite; check its weights, or load it in float32.")
    return logits_C.log_softmax(-1)
