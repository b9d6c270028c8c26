"""Probe: one stored input and the trained model's behaviour on it, stage by stage.

A model that was trained at many budgets is recorded at several of them, under `other.K.` and the same names.

probe.tensors       input.NAME        tensors of the call (ids, mask, pixels)
                    stage.N.retained  uint8 (rows, vision tokens of the longest row): 1 where a token is retained
                    logits            fp32 (samples, vocabulary) of the first new token
                    tokens            int64 (samples, new tokens), greedy
probe.json          budgets, stages, dtype, attention implementation, device, versions, tolerance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from tpcompress.errors import first_line
from tpcompress.export.budgets import as_dict
from tpcompress.export.folder import read_json, write_json
from tpcompress.inference import inference
from tpcompress.insertion.attach import attachment_of, budgets, mode, record
from tpcompress.insertion.budget import Budget

NEW_TOKENS = 8
SIDES = (224, 448, 896)
"""Sides of the built-in image, of which the first is used that the plan shortens."""
TENSORS = "probe.tensors"
"""File of the probe's tensors, in the format of safetensors. Engines load every `*.safetensors` of a folder as weights,
so it has another name; earlier versions wrote `probe.safetensors`."""
QUESTION = "What is in this picture? Answer in one word."

LOGIT_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest logit gap that counts as equal, as a share of the largest logit. fp32 differs by the order of sums only."""


@dataclass(frozen=True)
class Probe:
    """A stored input and the outputs for it.

    Attributes:
        inputs: arguments of the call, on the CPU.
        retained: retained tokens of each stage, bool (rows, vision tokens).
        logits: fp32 logits of the first new token (samples, vocabulary).
        tokens: greedy continuation (samples, new tokens).
        about: contents of probe.json.
        others: records of the same input at other budgets.
    """

    inputs: dict[str, Tensor]
    retained: list[Tensor]
    logits: Tensor
    tokens: Tensor
    about: dict[str, Any]
    others: tuple[Probe, ...] = ()

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of the input, of all its images."""
        return sum(self.about["stages"][0]["vision_tokens"])

    @property
    def prunes(self) -> bool:
        """Whether a vision token was dropped."""
        return sum(self.about["stages"][-1]["retained"]) < self.vision_tokens

    @property
    def budgets(self) -> list[Budget]:
        """Budgets of the record, one per stage."""
        return [Budget(**fields) for fields in self.about["budgets"]]

    def beside(self, others: Sequence[Probe]) -> Probe:
        """This probe with records of the same input at other budgets."""
        return replace(self, others=tuple(others))

    def save(self, folder: Path) -> None:
        """Write probe.tensors and probe.json."""
        tensors = {f"input.{name}": value for name, value in self.inputs.items()} | self._outcome("")
        for number, other in enumerate(self.others):
            tensors |= other._outcome(f"other.{number}.")
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
        others = [{name: other.about[name] for name in ("budgets", "stages")} for other in self.others]
        write_json(folder / "probe.json", self.about | {"others": others})

    @classmethod
    def read(cls, folder: Path) -> Probe:
        """Read the probe of a folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged.
        """
        about, path = read_json(folder / "probe.json"), folder / TENSORS
        if not path.is_file() and path.with_suffix(".safetensors").is_file():
            path = path.with_suffix(".safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy or export the folder again.")
        try:
            tensors = load_file(path)
            inputs = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
            listed = about.pop("others", [])
            others = [cls._of(tensors, f"other.{n}.", inputs, about | each) for n, each in enumerate(listed)]
            return cls._of(tensors, "", inputs, about).beside(others)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy or export the folder again.") from None

    def _outcome(self, prefix: str) -> dict[str, Tensor]:
        """Outputs under their names in probe.tensors."""
        retained = {f"{prefix}stage.{n}.retained": value.to(torch.uint8) for n, value in enumerate(self.retained)}
        return retained | {f"{prefix}logits": self.logits, f"{prefix}tokens": self.tokens}

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], prefix: str, inputs: dict[str, Tensor], about: dict[str, Any]) -> Probe:
        """The inverse of `_outcome`."""
        retained = [tensors[f"{prefix}stage.{n}.retained"].bool() for n in range(len(about["stages"]))]
        if not tensors[f"{prefix}logits"].isfinite().all():
            raise TypeError("its logits are not finite")
        return cls(inputs, retained, tensors[f"{prefix}logits"], tensors[f"{prefix}tokens"], about)


def tolerance(about: Mapping[str, Any]) -> float:
    """The largest logit gap that counts as equal, as a share of the largest: never more than that of the dtype."""
    most = LOGIT_TOLERANCE.get(str(about.get("dtype")), LOGIT_TOLERANCE["float32"])
    given = about.get("tolerance", most)
    return min(given, most) if isinstance(given, int | float) and given >= 0 else most


def first_probe(
    model: Any, processor: Any, inputs: Mapping[str, Any] | None, values: Sequence[Budget] | None = None
) -> Probe:
    """Record the probe of an export.

    Args:
        model: see `record_probe`.
        processor: makes the built-in input if there are no `inputs`; its image grows until a token is dropped.
        inputs: see `record_probe`.
        values: see `record_probe`.

    Raises:
        ValueError: see `record_probe` and `default_inputs`.
    """
    if inputs is not None:
        return record_probe(model, inputs, values)
    for side in SIDES:
        probe = record_probe(model, default_inputs(processor, side), values)
        if probe.prunes:
            break
    return probe


def check_probe_prunes(probe: Probe) -> None:
    """Check that a plan drops a vision token of the probe, at one of its budgets.

    Raises:
        ValueError: it retains all of them.
    """
    if not any(each.prunes for each in (probe, *probe.others)):
        raise ValueError(
            f"The plan prunes nothing: it retains all {probe.vision_tokens} vision tokens of the probe. Export with a "
            f"smaller budget (budgets=[tpcompress.Budget(keep_tokens=...)]), or give probe_inputs with images of the "
            f"size that you serve."
        )


def record_probe(model: Any, inputs: Mapping[str, Any], values: Sequence[Budget] | None = None) -> Probe:
    """Run a model once and record its stages, logits and greedy continuation.

    Args:
        model: with a plan attached; run in eval mode and mode `drop`, and left unchanged.
        inputs: processor outputs with an image.
        values: one budget per stage; default: the plan's.

    Raises:
        ValueError: no image, no ids, or a value that is not a tensor.
    """
    inputs = {name: value for name, value in inputs.items() if name != "labels" and value is not None}
    odd = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if odd or "input_ids" not in inputs:
        what = f"'{odd[0]}' is a {type(inputs[odd[0]]).__name__}" if odd else "input_ids are missing"
        raise ValueError(f"probe_inputs are tensors as a processor makes them (return_tensors='pt'), but {what}.")
    attached = attachment_of(model)
    base: Any = attached.parts.model
    chosen: AbstractContextManager[None] = nullcontext() if values is None else budgets(model, values)
    with inference(base), mode(model, "drop"), chosen, record(model) as trace:
        used = [as_dict(budget) for budget in attached.settings.budgets]
        logits, tokens = _answer(base, inputs, sorted(attached.parts.placeholder_ids.values()))
    if not trace.stages:
        raise ValueError("probe_inputs have no image, so that no stage would be checked; give a prompt with one.")
    stages = [
        {"layer": s.layer, "vision_tokens": s.total, "retained": s.vision_out, "owner": s.owner} for s in trace.stages
    ]
    about = {
        "budgets": used,
        "stages": stages,
        **environment(base),
        "attention_by_part": _attention_by_part(base.config),
        "tolerance": LOGIT_TOLERANCE.get(_dtype(base), 1e-4),
    }
    stored = {name: value.detach().cpu() for name, value in inputs.items()}
    return Probe(stored, [s.retained_RV.cpu() for s in trace.stages], logits.cpu(), tokens.cpu(), about)


def environment(base: Any) -> dict[str, str]:
    """Settings that can change a replay of the same weights."""
    import transformers

    return {
        "dtype": _dtype(base),
        "attention": str(base.config.get_text_config()._attn_implementation),
        "device": base.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _attention_by_part(config: Any) -> dict[str, str | None]:
    """Attention implementations as transformers' `attn_implementation` takes them: some models cannot have one for all.

    `""` stands for the whole; a vision encoder that knows eager attention only is in a model that cannot run on sdpa,
    while its language model does.
    """
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {"": config} | {name: part for name, part in parts.items() if part is not None}
    return {name: part._attn_implementation for name, part in found.items()}


def default_inputs(processor: Any, side: int = 224, image: Any = None) -> dict[str, Tensor]:
    """Process a synthetic image and a question, through the chat template if the processor has one.

    Args:
        processor: of the model.
        side: height and width of the image.
        image: another image, as PIL reads it.

    Raises:
        ValueError: the processor does not accept them.
    """
    text: Any = f"USER: {getattr(processor, 'image_token', '<image>')}\n{QUESTION} ASSISTANT:"
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(processor(images=[_image(side) if image is None else image], text=[text], return_tensors="pt"))
    except Exception as error:
        raise ValueError(
            f"The processor does not accept the built-in probe ({first_line(error)}); pass probe_inputs=processor(...)."
        ) from error


def _answer(base: Any, inputs: Mapping[str, Tensor], placeholders: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of the first new token and the greedy continuation, in which placeholders are suppressed."""
    length = inputs["input_ids"].shape[1]
    moved = {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    # Not the model's own generation config: sampling and penalties set there are not part of the check.
    eos = base.generation_config.eos_token_id
    pad = base.generation_config.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    options = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, use_cache=True, eos_token_id=eos, pad_token_id=pad,
        suppress_tokens=placeholders, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    out = base.generate(**moved, generation_config=options)
    return out.logits[0].float(), out.sequences[:, length:]


def _dtype(base: Any) -> str:
    return str(base.dtype).removeprefix("torch.")


def _image(side: int) -> Any:
    """A bright disc on a colour ramp with stripes: all regions differ, so that a wrong selection changes the output."""
    from PIL import Image

    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ramp = torch.stack([x, y, (x * 7 + y * 3) % side], -1) * (255 / side)
    disc = ((x - side * 0.7) ** 2 + (y - side * 0.3) ** 2 < (side * 0.18) ** 2)[..., None]
    stripes = ((x // 9 + y // 23) % 3 == 0)[..., None] & (y > side // 2)[..., None]
    pixels = torch.where(disc, torch.tensor([250.0, 240.0, 40.0]), torch.where(stripes, 255 - ramp, ramp))
    return Image.fromarray(pixels.to(torch.uint8).numpy())
