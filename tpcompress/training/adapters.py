"""Adds PEFT adapters to a base, and refuses before training what an export could not contain."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from tpcompress.errors import first_line
from tpcompress.export.adapters import check_ties
from tpcompress.families import Parts
from tpcompress.training.trainable import TRAINABLE

NARROWING = (
    "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
"""Fields of tuners that select modules of a whole model."""


def add_lora(
    model: nn.Module, fields: dict[str, Any], parts: Parts, train: set[str], needs_base: bool = False
) -> nn.Module:
    """Wrap a model with PEFT. Fully trained parts become modules_to_save, so that disabling adapters gives the base.

    Args:
        model: the base, frozen.
        fields: fields of peft.LoraConfig (DoRA: `use_dora`), or of another tuner's config named by `peft_type`.
        parts: parts of the model.
        train: parts that train fully.
        needs_base: the teacher is the model with its adapters disabled, which must be the base.

    Raises:
        ValueError: unknown tuner, a tuner that cannot be merged into weights, invalid fields, adapters on one of
            several modules that share a weight, an initialisation that a checkpoint cannot repeat, or (with
            `needs_base`) adapters under which the base changes.
    """
    inside = parts.family.language_model.rpartition(".")[2]
    fields = {"target_modules": rf".*{inside}.*\.(q|k|v|o|gate|up|down)_proj"} | fields
    kind = str(fields.pop("peft_type", "LORA")).upper()
    mergeable = sorted(str(t.value) for t, c in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(c, BaseTuner))
    if kind not in mergeable:
        raise ValueError(f"lora: no tuner '{kind}' whose weights can be merged; choose from {', '.join(mergeable)}.")
    kind_of_config: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    whole = [getattr(parts.family, name).rpartition(".")[2] for name in TRAINABLE if name in train]
    if whole:
        fields["modules_to_save"] = sorted({*(fields.get("modules_to_save") or []), *whole})
    before = [(parameter, _sample(parameter)) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT reads the old name
            warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")  # refused below, with the way out
            config = kind_of_config(**fields)
            wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error).removeprefix(f"{kind_of_config.__name__}.__init__() ")
        raise ValueError(f"lora: {reason}; it takes the fields of peft.{kind_of_config.__name__}.") from error
    check_ties(wrapped)
    _check_merges(wrapped, kind)
    _check_base(before, wrapped, config, needs_base)
    return wrapped


def adapter_tensors(model: nn.Module, base: Sequence[Tensor]) -> set[str]:
    """Names of the tensors that adapters added to a model: also frozen ones, which a checkpoint must contain.

    Args:
        model: with adapters.
        base: parameters and buffers of the model without them.
    """
    known = {id(value) for value in base}
    return {name for name, value in [*model.named_parameters(), *model.named_buffers()] if id(value) not in known}


def _check_base(
    before: list[tuple[nn.Parameter, Tensor | None]], model: nn.Module, config: PeftConfig, needs_base: bool
) -> None:
    """Check that the base's weights are what they were, or can be made again.

    Raises:
        ValueError: they were changed at random, or changed or trained although the teacher needs them.
    """
    now = {id(parameter) for parameter in model.parameters()}
    changed = any(id(p) not in now or not _equal(_sample(p), sample) for p, sample in before)
    start = f"init_lora_weights {getattr(config, 'init_lora_weights', True)}"
    if changed and not _repeats(model, config):
        raise ValueError(
            f"lora: {start} changes the weights of the base at random, which a checkpoint of adapters cannot repeat, "
            f"so that the trained model would be lost; use pissa or olora, or leave it out."
        )
    if needs_base and (changed or any(parameter.requires_grad for parameter, _ in before)):
        what = f"{start} changes" if changed else f"bias {getattr(config, 'bias', '')} trains"
        raise ValueError(
            f"Teacher AdapterOff is the model without its adapters, but lora.{what} the weights below them, so that "
            f"it is not the base; leave it out, or use teacher FrozenCopy."
        )


def _repeats(model: nn.Module, config: PeftConfig) -> bool:
    """Whether adapters change the base alike from different random states, tried on the smallest adapted layer."""
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layer = min((m.get_base_layer() for m in adapted), key=lambda module: sum(p.numel() for p in module.parameters()))
    alone: Any = copy.deepcopy(config)
    alone.target_modules = {"layer"}
    for name in NARROWING:
        if hasattr(alone, name):
            setattr(alone, name, None)
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped: Any = get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(layer)}), copy.deepcopy(alone))  # type: ignore[arg-type]
        inner = wrapped.base_model.model["layer"].get_base_layer()
        found.append([parameter.detach() for parameter in inner.parameters()])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def _sample(parameter: nn.Parameter, count: int = 64) -> Tensor | None:
    """Some values of a weight, over its whole length; None on the meta device."""
    if parameter.is_meta:
        return None
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // count)].clone()


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one.to(other.dtype), other)


def _check_merges(model: nn.Module, kind: str) -> None:
    """Merge a copy of the smallest adapted layer, to refuse before training what could not be exported.

    Raises:
        ValueError: PEFT cannot merge the layer.
    """
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # A quantised base is merged into its full-precision weights at export, and meta weights cannot be merged.
    plain = [m for m in adapted if all(p.is_floating_point() and not p.is_meta for p in m.parameters())]
    if not plain:
        return
    layer: Any = copy.deepcopy(min(plain, key=lambda module: sum(p.numel() for p in module.parameters())))
    try:
        layer.merge()
    except Exception as error:  # tuners raise different exception types
        raise ValueError(
            f"lora: {kind} adapters cannot be merged, so not exported ({first_line(error)}); use LORA."
        ) from error
