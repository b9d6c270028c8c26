"""The model that a harness runs: an export with its plan, a base with a training-free plan, or a dense base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from tpcompress.auto_register import PREFIX
from tpcompress.errors import counted, first_line, read_yaml
from tpcompress.export.loader import load
from tpcompress.inference import default_device
from tpcompress.insertion.attach import attach, detach, is_attached, plan_of
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.plan_source import read_keep
from tpcompress.models import DTYPES, load_base, load_processor, model_path

STAGES = "+"
"""Separates stages and their budgets, beside the comma, which separates arguments in the harnesses."""


@dataclass(frozen=True)
class ModelSettings:
    """Which model a harness runs. All fields may be text, as from a command line.

    Attributes:
        pretrained: folder or hub id of an export or a base, or a bundled name.
        plan: plan of a base, as `tpcompress fit --plan` takes it (`divprune:1/9`); stages may also be separated by `+`
            (`divprune:0.25@0+dart:64@8`). For an export it replaces the exported plan.
        dense: run an export without its plan.
        keep_tokens: other budget of an export: tokens per image; one per stage, separated by `+`.
        keep_ratio: the same as ratios or fractions (`1/9`).
        dtype: weight dtype; `auto` is that of the checkpoint.
        device: device; default: the accelerator, or the CPU.
        device_map: how transformers places the weights, instead of `device`.
        attn_implementation: attention implementation of transformers.
        min_pixels, max_pixels: limits on the pixels of an image, for processors that keep its size (Qwen-VL).
        processor_settings: YAML or JSON file of further arguments of the processor.

    Raises:
        ValueError: settings that exclude each other, or an unknown dtype.
    """

    pretrained: str
    plan: str | None = None
    dense: bool = False
    keep_tokens: Any = None
    keep_ratio: Any = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    processor_settings: str | None = None

    def __post_init__(self) -> None:
        changes = [name for name in ("plan", "dense", "keep_tokens", "keep_ratio") if getattr(self, name)]
        if len(changes) > 1:
            raise ValueError(f"{' and '.join(changes)} exclude each other; give one of them.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded model.

    Attributes:
        model: in eval mode, with its plan attached.
        processor: its processor.
        plan: the plan; None for a dense model.
        description: what it is, in one sentence.
    """

    model: nn.Module
    processor: Any
    plan: PruningPlan | None
    description: str

    @classmethod
    def load(cls, settings: ModelSettings) -> Served:
        """Load a model and its processor.

        Raises:
            FileNotFoundError, ValueError: there is none, or the settings do not fit it.
        """
        path = model_path(settings.pretrained)
        exported = is_export(path)
        placed: dict[str, Any] = {"device_map": settings.device_map} if settings.device_map else {}
        if exported:
            kept: dict[str, Any] = {
                "keep_tokens": _counts(settings.keep_tokens),
                "keep_ratio": _ratios(settings.keep_ratio),
            }
            more: dict[str, Any] = (
                {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
            )
            model: Any = load(path, dtype=settings.dtype, **kept, **placed, **more)
            if (settings.dense or settings.plan) and is_attached(model):
                detach(model)
        else:
            if settings.keep_tokens or settings.keep_ratio:
                raise ValueError(
                    f"{settings.pretrained} is a base without a plan, so there is no budget to change; give a plan "
                    f"such as plan=divprune:64."
                )
            model = load_base(path, settings.dtype, settings.attn_implementation, **placed)
        if not settings.device_map:
            model = model.to(settings.device or default_device())
        if settings.plan:
            attach(model, read_plan(settings.plan))
        plan = plan_of(model) if is_attached(model) else None
        processor = with_pixels(_processor(path, settings), settings.min_pixels, settings.max_pixels)
        return cls(model.eval(), processor, plan, _described(settings.pretrained, exported, plan))


def read_plan(text: str) -> PruningPlan:
    """The plan of a command line: see `ModelSettings.plan`.

    Raises:
        FileNotFoundError, ValueError: not a plan.
    """
    text = str(text).strip().strip("'\"")
    return PruningPlan.of(text if Path(text).is_file() else text.replace(STAGES, ","))


def plan_text(plan: PruningPlan) -> str:
    """The plan in the short form that `read_plan` reads, without arguments of its pruners."""
    kept = [stage.keep_ratio if stage.keep_tokens is None else stage.keep_tokens for stage in plan.stages]
    parts = zip(plan.stages, kept, strict=True)
    return STAGES.join(f"{stage.pruner.name}:{0 if keep is None else keep:g}@{stage.layer}" for stage, keep in parts)


def is_export(path: str) -> bool:
    """Whether a folder or hub id holds an export of tpcompress.

    Raises:
        ValueError: its config cannot be read.
    """
    try:
        config, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no readable config.json ({first_line(error)}).") from error
    return str(config.get("model_type")).startswith(PREFIX)


def with_pixels(processor: Any, least: int | None, most: int | None) -> Any:
    """The processor with other limits on the pixels of an image.

    Raises:
        ValueError: it resizes images to a fixed size.
    """
    if least is None and most is None:
        return processor
    images = processor.image_processor
    size = getattr(images, "size", None) or {}
    limits: dict[str, Any] = {
        name: getattr(size, "get", lambda key: None)(name) for name in ("shortest_edge", "longest_edge")
    }
    if not all(limits.values()) or not getattr(images, "merge_size", None):
        raise ValueError(
            f"min_pixels and max_pixels are for processors that keep the size of an image (Qwen-VL); "
            f"{type(images).__name__} does not. Give processor_settings=FILE.yaml with its own arguments."
        )
    # In these processors both edges of `size` are areas.
    low, high = least or limits["shortest_edge"], most or limits["longest_edge"]
    if low > high:
        raise ValueError(f"min_pixels {low} is above max_pixels {high}; give a smaller min_pixels.")
    images.size = {"shortest_edge": low, "longest_edge": high}
    return processor


def _processor(path: str, settings: ModelSettings) -> Any:
    if settings.processor_settings is None:
        return load_processor(path)
    from transformers import AutoProcessor

    values = read_yaml(settings.processor_settings)
    if not isinstance(values, Mapping):
        raise ValueError(f"{settings.processor_settings} is not a mapping of processor arguments.")
    try:
        return AutoProcessor.from_pretrained(path, **values)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"The processor of {path} refuses {settings.processor_settings}: {first_line(error)}."
        ) from error


def _parts(value: Any) -> list[str]:
    return [part.strip() for part in str(value).strip("'\"").split(STAGES)]


def _counts(value: Any) -> int | list[int] | None:
    if value is None:
        return None
    found = [read_keep(part).get("keep_tokens") for part in _parts(value)]
    counts = [count for count in found if count is not None]
    if len(counts) < len(found):
        raise ValueError(f"keep_tokens={value} is not a count of tokens; use keep_ratio for ratios.")
    return counts[0] if len(counts) == 1 else counts


def _ratios(value: Any) -> float | list[float] | None:
    if value is None:
        return None
    found = [read_keep(part).get("keep_ratio") for part in _parts(value)]
    ratios = [ratio for ratio in found if ratio is not None]
    if len(ratios) < len(found):
        raise ValueError(f"keep_ratio={value} is not a ratio such as 1/9 or 0.11; use keep_tokens for counts.")
    return ratios[0] if len(ratios) == 1 else ratios


def _described(name: str, exported: bool, plan: PruningPlan | None) -> str:
    if plan is None:
        what = "an export without its plan" if exported else "a base without a plan"
        return f"{name} is {what}: it runs dense."
    stages = ", ".join(f"{stage.pruner.name} with {stage.budget} at layer {stage.layer}" for stage in plan.stages)
    source = "an export" if exported else "a base with a training-free plan"
    return f"{name} is {source} of {counted(len(plan.stages), 'stage')}: {stages}; positions {plan.positions}."


__all__ = ["STAGES", "ModelSettings", "Served", "is_export", "plan_text", "read_plan", "with_pixels"]
