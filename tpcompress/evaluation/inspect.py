"""Run one prefill with images and videos, and show what every stage of a plan does: tokens, sequence, KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from tpcompress.bundled import base_path
from tpcompress.errors import first_line
from tpcompress.evaluation.figures.fields import fields_of
from tpcompress.evaluation.figures.overlay import media_panels, panels_figure, stage_panels
from tpcompress.evaluation.prompt import Media, chat_inputs, read_image, read_video
from tpcompress.export import load
from tpcompress.export.registry import PREFIX
from tpcompress.families import family_of
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import attach, attachment_of, detach, is_attached, record
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.trace import StageTrace
from tpcompress.models import load_base, load_processor


@dataclass(frozen=True, eq=False)
class Inspection:
    """Record of one prefill.

    Attributes:
        media: images and sampled videos of the prompt.
        inputs: processor outputs for the prompt.
        stages: record of every stage.
        pruners: pruner name of every stage.
        cache: KV cache length of every decoder layer; None for a layer whose state has no columns.
    """

    media: Media
    inputs: dict[str, Any]
    stages: list[StageTrace]
    pruners: list[str]
    cache: list[int | None]

    @property
    def groups(self) -> list[tuple[int, int, int | None]]:
        """Consecutive layers with the same cache length: (first layer, last layer, columns)."""
        found = []
        for columns, layers in groupby(range(len(self.cache)), key=self.cache.__getitem__):
            listed = list(layers)
            found.append((listed[0], listed[-1], columns))
        return found

    @property
    def cache_line(self) -> str:
        """`layers 0-1: 640 columns, layers 2-31: 208 columns`."""
        entries = []
        for first, last, columns in self.groups:
            layers = f"layer {first}" if first == last else f"layers {first}-{last}"
            entries.append(f"{layers}: " + ("a state without columns" if columns is None else f"{columns} columns"))
        return ", ".join(entries)

    def print(self, console: Console) -> None:
        """Print a table of the stages and the cache lengths."""
        table = Table("stage", "layer", "pruner", "vision tokens", "sequence", title="Stages")
        for stage, name in zip(self.stages, self.pruners, strict=True):
            table.add_row(
                str(stage.stage), str(stage.layer), name,
                f"{sum(stage.vision_in)} -> {sum(stage.vision_out)}", f"{stage.sequence_in} -> {stage.sequence_out}",
            )  # fmt: skip
        console.print(table)
        console.print(f"KV cache after the prefill: {self.cache_line}", soft_wrap=True, highlight=False)

    def draw(self, image_processor: Any, path: str | Path) -> None:
        """Draw the retained tokens over images and frames, one panel per stage and field.

        Args:
            image_processor: image processor of the model.
            path: output image; its folder is created.
        """
        fields = fields_of(self.stages[0], self.inputs, self.media, image_processor)
        names = [
            f"stage {s.stage} · layer {s.layer} · {name}" for s, name in zip(self.stages, self.pruners, strict=True)
        ]
        panels_figure(media_panels(self.media), stage_panels(self.stages, names, fields), path)


def run_inspection(
    model: str,
    image: str | Sequence[str] | None,
    prompt: str,
    plan: str | None,
    out: str,
    dtype: str,
    device: str,
    console: Console,
    video: str | Sequence[str] | None = None,
    num_frames: int = 8,
) -> Inspection:
    """Load a model, run one prefill, print the tables and draw the figure.

    Args:
        model: folder, hub id, bundled name, an exported folder, or the folder or checkpoint of a run.
        image: image file, or several.
        prompt: question, with or without `<image>` and `<video>`.
        plan: plan file, recipe or short form; None for the plan of an exported folder or a run.
        out: output PNG file.
        dtype, device: dtype and device of the model.
        console: console for the tables.
        video: video file, or several.
        num_frames: frames of each video, spread evenly.

    Raises:
        FileNotFoundError, ValueError: an argument is invalid or a file is missing.
    """
    if Path(out).suffix.lower() != ".png" or Path(out).is_dir():
        raise ValueError(f"--out {out} is not the name of a PNG file; give one such as inspect.png.")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
    chosen = None if plan is None else PruningPlan.of(plan)
    images, videos = _files(image), _files(video)
    if not images and not videos:
        raise ValueError("There is no image and no video; give --image, --video or both.")
    media = Media([read_image(path) for path in images], [read_video(path, num_frames) for path in videos])
    subject, processor = load_subject(model, chosen, dtype, device)
    found = inspect_prefill(subject, processor, media, prompt)
    found.print(console)
    found.draw(processor.image_processor, out)
    return found


def inspect_prefill(model: Any, processor: Any, media: Media | Image.Image, prompt: str) -> Inspection:
    """Run and record one prefill of a model with a plan.

    Args:
        model: model with an attached plan.
        processor: processor of the model, with a chat template.
        media: images and videos of the prompt, or one image.
        prompt: question, with or without `<image>` and `<video>`.

    Raises:
        ValueError: no plan is attached, the prompt cannot be rendered, or the prefill had no vision tokens.
    """
    attachment = attachment_of(model)
    media = Media([media]) if isinstance(media, Image.Image) else media
    inputs = chat_inputs(processor, media, prompt)
    with inference(model), record(model) as trace:
        output = model(**inputs_for(model, inputs), use_cache=True)
    if not trace.stages:
        raise ValueError("No vision token reached the language model; use the processor that belongs to the model.")
    pruners = [attachment.plan.stages[stage.stage].pruner.name for stage in trace.stages]
    return Inspection(media, inputs, trace.stages, pruners, cache_columns(attachment.parts, output.past_key_values))


def _files(given: str | Sequence[str] | None) -> list[str]:
    """Paths; a text that is no file is split at its commas."""
    if isinstance(given, str):
        return [given] if Path(given).exists() else [path.strip() for path in given.split(",")]
    return list(given or ())


def cache_columns(parts: Any, cache: Any) -> list[int | None]:
    """Number of keys that each decoder layer attends to; None for a layer with only a recurrent state."""
    columns: list[int | None] = []
    for layer in range(len(parts.layers)):
        keys = getattr(cache.layers[parts.family.keys_of(parts.model.config, layer)], "keys", None)
        columns.append(keys.shape[-2] if torch.is_tensor(keys) and keys.ndim == 4 else None)
    return columns


def load_subject(name: str, plan: PruningPlan | None, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model with a plan, in eval mode, and its processor.

    Args:
        name: folder, hub id, bundled name, an exported folder, or the folder or checkpoint of a run.
        plan: plan to attach, which replaces that of an exported folder or run; None keeps the latter.
        dtype, device: dtype and device of the model.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no loadable model, its family is unknown, there is no plan, or the plan requires training.
    """
    untrained = [stage.pruner.name for stage in plan.stages if stage.pruner.learned] if plan is not None else []
    if untrained:
        raise ValueError(f"Pruner '{untrained[0]}' has weights to train; inspect an exported folder, without --plan.")
    folder = Path(base_path(name))
    if folder.suffix == ".ckpt" or (folder / "checkpoints").is_dir():
        return _load_run(folder, plan, dtype, device)
    exported = _check_family(folder).startswith(PREFIX)
    model: Any = load(folder, dtype=dtype) if exported else load_base(name, dtype)
    if plan is not None:
        attach(detach(model) if is_attached(model) else model, plan)
    if not is_attached(model):
        raise ValueError(f"{name} has no plan of its own; give --plan, a file or a short form such as divprune:64@0.")
    return model.to(device).eval(), load_processor(name)


def _load_run(folder: Path, plan: PruningPlan | None, dtype: str, device: str) -> tuple[Any, Any]:
    """The model of a run, also of an unfinished one, as its last checkpoint has it."""
    from tpcompress.training.checkpoints.load import load_trained  # loads the training frameworks

    trained = load_trained(folder, allow_unfinished=True, unquantised=True)
    model: Any = trained.model
    if plan is not None:
        attach(detach(model) if is_attached(model) else model, plan)
    if not is_attached(model):
        raise ValueError(f"{folder} is a run without a plan (the dense control); give --plan, such as divprune:64@0.")
    if dtype not in ("float32", "auto"):
        model = model.to(getattr(torch, dtype))
    return model.to(device).eval(), trained.processor


def _check_family(folder: Path) -> str:
    """Return the model type of a local folder, else an empty string; unknown families raise before weights are read."""
    if not (folder / "config.json").is_file():
        return ""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"No model at '{folder}': {first_line(error)}. Give a complete model folder.") from error
    family_of(config)
    return str(config.model_type)
