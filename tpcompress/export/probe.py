"""The probe: one stored input and what the trained model did with it, stage by stage; and its replay.

A model that was trained at many budgets has a replay at several: `other.K.` and the same names.

probe.safetensors   input.NAME        tensors of the call (ids, mask, pixels)
                    stage.N.retained  uint8 (rows, vision tokens of the longest row): 1 where a token is left
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
from tpcompress.insertion.attach import base_of, budgets, controller_of, mode, record
from tpcompress.insertion.plan import Budget

NEW_TOKENS = 8
QUESTION = "What is in this picture? Answer in one word."

# Largest logit gap that counts as equal, as a share of the largest logit. fp32 differs by the order of sums only.
LOGIT_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Probe:
    """A stored input and what came of it.

    Attributes:
        inputs: arguments of the call, on the CPU.
        retained: per stage, bool (rows, vision tokens).
        logits: of the first new token, fp32.
        tokens: greedy continuation.
        about: the contents of probe.json.
        others: the same input at other budgets; `about` of each names them under `budgets`.
    """

    inputs: dict[str, Tensor]
    retained: list[Tensor]
    logits: Tensor
    tokens: Tensor
    about: dict[str, Any]
    others: tuple[Probe, ...] = ()

    @property
    def budgets(self) -> list[Budget]:
        """Those of the run, one per stage."""
        return [Budget(**fields) for fields in self.about["budgets"]]

    def beside(self, others: Sequence[Probe]) -> Probe:
        """This one, holding others of the same input as well."""
        return replace(self, others=tuple(others))

    def save(self, folder: Path) -> None:
        """Write probe.safetensors and probe.json."""
        tensors = {f"input.{name}": value for name, value in self.inputs.items()} | self._outcome("")
        for number, other in enumerate(self.others):
            tensors |= other._outcome(f"other.{number}.")
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "probe.safetensors")
        others = [{name: other.about[name] for name in ("budgets", "stages")} for other in self.others]
        write_json(folder / "probe.json", self.about | {"others": others})

    @classmethod
    def read(cls, folder: Path) -> Probe:
        """The probe of a folder.

        Raises:
            FileNotFoundError, ValueError: a file of it is missing or damaged.
        """
        about, path = read_json(folder / "probe.json"), folder / "probe.safetensors"
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
        """What came of the input, under the names of the file."""
        retained = {f"{prefix}stage.{n}.retained": value.to(torch.uint8) for n, value in enumerate(self.retained)}
        return retained | {f"{prefix}logits": self.logits, f"{prefix}tokens": self.tokens}

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], prefix: str, inputs: dict[str, Tensor], about: dict[str, Any]) -> Probe:
        """The inverse of `_outcome`."""
        retained = [tensors[f"{prefix}stage.{n}.retained"].bool() for n in range(len(about["stages"]))]
        return cls(inputs, retained, tensors[f"{prefix}logits"], tensors[f"{prefix}tokens"], about)


def record_probe(model: Any, inputs: Mapping[str, Any], values: Sequence[Budget] | None = None) -> Probe:
    """Run a model once and keep what its stages did.

    Args:
        model: with a plan attached; it is run in eval mode and mode `drop`, and left as it was.
        inputs: arguments of the call as a processor makes them; they must hold an image.
        values: budgets, one per stage; the plan's without it.

    Raises:
        ValueError: no image, no ids, or something that is not a tensor.
    """
    inputs = {name: value for name, value in inputs.items() if name != "labels" and value is not None}
    odd = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if odd or "input_ids" not in inputs:
        what = f"'{odd[0]}' is a {type(inputs[odd[0]]).__name__}" if odd else "input_ids are missing"
        raise ValueError(f"probe_inputs are tensors as a processor makes them (return_tensors='pt'), but {what}.")
    base: Any = base_of(model)
    chosen: AbstractContextManager[None] = nullcontext() if values is None else budgets(model, values)
    with inference(base), mode(model, "drop"), chosen, record(model) as trace:
        used = [as_dict(budget) for budget in controller_of(base).budgets]
        logits, tokens = _answer(base, inputs)
    if not trace.stages:
        raise ValueError("probe_inputs hold no image, so no stage would be checked; give a prompt with one.")
    stages = [
        {"layer": s.layer, "vision_tokens": s.total, "retained": s.vision_out, "owner": s.owner} for s in trace.stages
    ]
    about = {
        "budgets": used,
        "stages": stages,
        **environment(base),
        "tolerance": LOGIT_TOLERANCE.get(_dtype(base), 1e-4),
    }
    stored = {name: value.detach().cpu() for name, value in inputs.items()}
    return Probe(stored, [s.retained_RV.cpu() for s in trace.stages], logits.cpu(), tokens.cpu(), about)


def environment(base: Any) -> dict[str, str]:
    """What can make a replay differ although the weights are the same."""
    import transformers

    return {
        "dtype": _dtype(base),
        "attention": str(base.config.get_text_config()._attn_implementation),
        "device": base.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def default_inputs(processor: Any) -> dict[str, Tensor]:
    """A synthetic picture and a question, through the processor and its chat template if it has one.

    Raises:
        ValueError: the processor does not take them; give `probe_inputs` then.
    """
    text: Any = f"USER: {getattr(processor, 'image_token', '<image>')}\n{QUESTION} ASSISTANT:"
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(processor(images=[_picture()], text=[text], return_tensors="pt"))
    except Exception as error:
        raise ValueError(
            f"The processor does not take the built-in probe ({first_line(error)}); pass probe_inputs=processor(...)."
        ) from error


def _answer(base: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the first new token and the greedy continuation."""
    length = inputs["input_ids"].shape[1]
    moved = {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    # Not the model's own generation config: what users set there (sampling, penalties) is not what is checked.
    eos = base.generation_config.eos_token_id
    pad = base.generation_config.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    placeholders = sorted(controller_of(base).parts.placeholder_ids.values())
    options = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, use_cache=True, eos_token_id=eos, pad_token_id=pad,
        suppress_tokens=placeholders, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    out = base.generate(**moved, generation_config=options)
    return out.logits[0].float(), out.sequences[:, length:]


def _dtype(base: Any) -> str:
    return str(base.dtype).removeprefix("torch.")


def _picture(side: int = 224) -> Any:
    """A bright disc on a colour ramp with stripes: no two regions are alike, so a wrong choice of tokens shows."""
    from PIL import Image

    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ramp = torch.stack([x, y, (x * 7 + y * 3) % side], -1) * (255 / side)
    disc = ((x - side * 0.7) ** 2 + (y - side * 0.3) ** 2 < (side * 0.18) ** 2)[..., None]
    stripes = ((x // 9 + y // 23) % 3 == 0)[..., None] & (y > side // 2)[..., None]
    pixels = torch.where(disc, torch.tensor([250.0, 240.0, 40.0]), torch.where(stripes, 255 - ramp, ramp))
    return Image.fromarray(pixels.to(torch.uint8).numpy())
