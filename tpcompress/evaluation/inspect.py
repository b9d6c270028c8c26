"""One image, one prompt, one prefill: what every stage of a plan does to it, and what is left of the picture."""

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
from tpcompress.data.rows import IMAGE_MARKER, BadRow, open_image
from tpcompress.errors import first_line
from tpcompress.evaluation.figures.overlay import grids_of, panels_figure, pictures_of, stage_panels
from tpcompress.export import load
from tpcompress.export.registry import PREFIX
from tpcompress.families import family_of
from tpcompress.inference import inference
from tpcompress.insertion.attach import attach, controller_of, detach, is_attached, record
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.trace import StageTrace
from tpcompress.models import load_base, load_processor


@dataclass(frozen=True, eq=False)
class Inspection:
    """What one prefill left behind.

    Attributes:
        image: upright, as it was given.
        inputs: what the processor made of image and prompt.
        stages: record of every stage.
        pruners: their names.
        cache: columns that every decoder layer keeps; None for a layer whose memory has no columns.
    """

    image: Image.Image
    inputs: dict[str, Any]
    stages: list[StageTrace]
    pruners: list[str]
    cache: list[int | None]

    @property
    def groups(self) -> list[tuple[int, int, int | None]]:
        """Neighbouring layers with caches of one length: first layer, last layer, columns."""
        found = []
        for columns, layers in groupby(range(len(self.cache)), key=self.cache.__getitem__):
            listed = list(layers)
            found.append((listed[0], listed[-1], columns))
        return found

    @property
    def cache_line(self) -> str:
        """`layers 0-1: 640 columns, layers 2-31: 208 columns`."""
        said = []
        for first, last, columns in self.groups:
            layers = f"layer {first}" if first == last else f"layers {first}-{last}"
            said.append(f"{layers}: " + ("a state without columns" if columns is None else f"{columns} columns"))
        return ", ".join(said)

    def print(self, console: Console) -> None:
        """A table of the stages, and a line about the cache."""
        table = Table("stage", "layer", "pruner", "vision tokens", "sequence", title="Stages")
        for stage, name in zip(self.stages, self.pruners, strict=True):
            table.add_row(
                str(stage.stage), str(stage.layer), name,
                f"{sum(stage.vision_in)} -> {sum(stage.vision_out)}", f"{stage.sequence_in} -> {stage.sequence_out}",
            )  # fmt: skip
        console.print(table)
        console.print(f"KV cache after the prefill: {self.cache_line}", soft_wrap=True, highlight=False)

    def draw(self, settings: Any, path: str | Path) -> None:
        """Write the retained tokens over the picture, a panel for every stage and grid.

        Args:
            settings: the image processor.
            path: an image file; its folder is made.
        """
        pictures = pictures_of(self.image, self.inputs, grids_of(self.stages[0]), settings)
        names = [
            f"stage {s.stage} · layer {s.layer} · {name}" for s, name in zip(self.stages, self.pruners, strict=True)
        ]
        panels_figure(self.image, stage_panels(self.stages, names, pictures), path)


def run_inspection(
    model: str, image: str, prompt: str, plan: str | None, out: str, dtype: str, device: str, console: Console
) -> Inspection:
    """Load, run one prefill, print the tables and write the picture.

    Args:
        model: folder, hub id, bundled name, or an exported folder.
        image: an image file.
        prompt: the question, with or without `<image>`.
        plan: a plan file, a recipe, or a short form; None for the plan of an exported folder.
        out: the picture to write.
        dtype, device: of the model.
        console: where the tables go.

    Raises:
        FileNotFoundError, ValueError: anything of it is missing or impossible, in one line.
    """
    if Path(out).suffix.lower() != ".png" or Path(out).is_dir():
        raise ValueError(f"--out {out} is no name of a PNG file; give one such as inspect.png.")
    chosen = None if plan is None else PruningPlan.of(plan)
    picture = read_image(image)
    subject, processor = load_subject(model, chosen, dtype, device)
    found = inspect_prefill(subject, processor, picture, prompt)
    found.print(console)
    found.draw(processor.image_processor, out)
    return found


def inspect_prefill(model: Any, processor: Any, image: Image.Image, prompt: str) -> Inspection:
    """Run one prefill of a model that carries a plan.

    Args:
        model: with a plan attached.
        processor: of the model, with a chat template.
        image: upright RGB.
        prompt: the question, with or without `<image>`.

    Raises:
        ValueError: no plan is attached, the prompt cannot be written, or no vision token reached the language model.
    """
    controller = controller_of(model)
    inputs = chat_inputs(processor, image, prompt)
    weight = next(model.parameters())
    moved = {
        name: x.to(weight.device, weight.dtype if x.is_floating_point() else None) if torch.is_tensor(x) else x
        for name, x in inputs.items()
    }
    with inference(model), record(model) as trace:
        output = model(**moved, use_cache=True)
    if not trace.stages:
        raise ValueError("No vision token reached the language model; use the processor that belongs to the model.")
    pruners = [controller.plan.stages[stage.stage].pruner.name for stage in trace.stages]
    return Inspection(image, inputs, trace.stages, pruners, cache_columns(controller.parts, output.past_key_values))


def cache_columns(parts: Any, cache: Any) -> list[int | None]:
    """Columns whose keys each decoder layer reads; None for a layer with a recurrent state only."""
    columns: list[int | None] = []
    for layer in range(len(parts.layers)):
        keys = getattr(cache.layers[parts.family.keys_of(parts.model.config, layer)], "keys", None)
        columns.append(keys.shape[-2] if torch.is_tensor(keys) and keys.ndim == 4 else None)
    return columns


def chat_inputs(processor: Any, image: Image.Image, prompt: str) -> dict[str, Any]:
    """Inputs of a model for one image and one question, through the processor's chat template.

    Args:
        processor: with a chat template.
        image: one image.
        prompt: the question; `<image>` says where the image belongs, else it stands first.

    Raises:
        ValueError: nothing is asked, several markers, no chat template, or one that takes no image.
    """
    before, marker, behind = prompt.partition(IMAGE_MARKER)
    if not (before + behind).strip():
        raise ValueError(f"The prompt {prompt!r} asks nothing; give a question such as 'What is this?'.")
    if IMAGE_MARKER in behind:
        raise ValueError(
            f"The prompt has {prompt.count(IMAGE_MARKER)} {IMAGE_MARKER} for one image; leave one or none."
        )
    words = [before, behind] if marker else ["", prompt]
    text = _templated(processor, *words)
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    return dict(processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special))


def read_image(path: str) -> Image.Image:
    """An image file as upright RGB.

    Raises:
        ValueError: missing, or no image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No image file {path}; give a picture, such as a PNG or a JPEG.")
    try:
        return open_image(path)
    except BadRow:
        raise ValueError(
            f"{path} is no image that can be read; give a whole picture, such as a PNG or a JPEG."
        ) from None


def load_subject(name: str, plan: PruningPlan | None, dtype: str, device: str) -> tuple[Any, Any]:
    """A model with a plan on it, in eval mode, and its processor.

    Args:
        name: folder, hub id, bundled name, or an exported folder.
        plan: what to attach; None keeps the plan of an exported folder, which any other replaces.
        dtype, device: of the model.

    Raises:
        FileNotFoundError, ValueError: nothing loadable there, no family of ours, no plan, or one that needs training.
    """
    untrained = [stage.pruner.name for stage in plan.stages if stage.pruner.learned] if plan is not None else []
    if untrained:
        raise ValueError(f"Pruner '{untrained[0]}' has weights to train; inspect an exported folder, without --plan.")
    folder = Path(base_path(name))
    exported = _check_family(folder).startswith(PREFIX)
    model: Any = load(folder, dtype=dtype) if exported else load_base(name, dtype)
    if plan is not None:
        attach(detach(model) if is_attached(model) else model, plan)
    if not is_attached(model):
        raise ValueError(f"{name} has no plan of its own; give --plan, a file or a short form such as divprune:64@0.")
    return model.to(device).eval(), load_processor(name)


def _check_family(folder: Path) -> str:
    """The model type of a local folder, or nothing; unknown families are refused before weights are read."""
    if not (folder / "config.json").is_file():
        return ""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"No model at '{folder}': {first_line(error)}. Give a folder with a whole model.") from error
    family_of(config)
    return str(config.model_type)


def _templated(processor: Any, before: str, behind: str) -> str:
    """The question as the chat template writes it: from a list of parts, or from a string with the image's token."""
    name = type(processor).__name__
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ValueError(f"{name} has no chat template; set processor.chat_template to that of its model family.")
    texts: Sequence[dict[str, str]] = [{"type": "text", "text": text.strip()} for text in (before, behind)]
    parts = [part for part in (texts[0], {"type": "image"}, texts[1]) if part.get("text", "-")]
    asked = [text["text"] for text in texts]
    for content in (parts, f"{before}{processor.image_token}\n{behind}".strip()):
        turn = {"role": "user", "content": content}
        try:
            text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        except Exception:  # jinja and python errors alike: a template of strings that gets a list
            continue
        if "'type'" not in text and all(words in text for words in asked):
            return str(text)
    raise ValueError(f"The chat template of {name} does not write an image and a text; set that of its model family.")
