"""Checks and sets up what trains: parts of the model, and PEFT adapters."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from tpcompress.errors import first_line
from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.losses import Loss
from tpcompress.training.phases import is_learned
from tpcompress.training.teachers import Teacher

TRAINABLE = ("vision_tower", "projector", "language_model")
"""Parts of a model, in the order of the data flow."""


def read_plan(plan: dict[str, Any] | str | None) -> PruningPlan | None:
    """A plan from a recipe: any form that `PruningPlan.of` reads, or nothing."""
    return None if plan is None else PruningPlan.of(plan)


def check_train(train: list[str] | str, lora: dict[str, Any] | None, plan: PruningPlan | None) -> set[str]:
    """The parts that train in the main phase, with `pruner` if it trains jointly with the rest.

    Raises:
        ValueError: unknown part, LoRA together with the part that it adapts, `pruner` without a learned pruner, or
            nothing to train.
    """
    names = [train] if isinstance(train, str) else list(train)
    parts = set(names) - {"full"} | (set(TRAINABLE) if "full" in names and lora is None else set())
    unknown = sorted(parts - {*TRAINABLE, "pruner"})
    if unknown:
        raise ValueError(
            f"train: unknown part {', '.join(unknown)}; choose of {', '.join(TRAINABLE)}, pruner, or full."
        )
    if "pruner" in parts and not is_learned(plan):
        raise ValueError("train: pruner needs a plan with a pruner that has weights, e.g. learned_gate.")
    if lora is not None and "language_model" in parts:
        raise ValueError("train: language_model and lora exclude each other; drop one of them.")
    if lora is None and not parts and not is_learned(plan):
        raise ValueError(
            f"Nothing trains: train is empty and there is no lora; choose of {', '.join(TRAINABLE)}, or full."
        )
    return parts


def check_losses(losses: list[Loss], teacher: Teacher | None, plan: PruningPlan | None) -> None:
    """Check that there are losses, and that a teacher and a learned pruner are there if and only if a loss needs them.

    Raises:
        ValueError: no loss, a loss without its teacher or pruner, or a teacher that no loss reads.
    """
    if not losses:
        raise ValueError("losses is empty; leave it out for the label loss, or name one, e.g. [Label, KL].")
    distilled = [loss.name for loss in losses if "teacher" in loss.needs]
    if distilled and teacher is None:
        raise ValueError(f"Loss '{distilled[0]}' needs a teacher; set model.teacher, e.g. AdapterOff or FrozenCopy.")
    if teacher is not None and not distilled:
        raise ValueError(
            f"Teacher '{type(teacher).__name__}' is unused: no loss in model.losses reads a teacher. Add KL, JSD or "
            f"Hidden, or remove model.teacher."
        )
    on_gates = [loss.name for loss in losses if "gate" in loss.needs]
    if on_gates and not is_learned(plan):
        raise ValueError(
            f"Loss '{on_gates[0]}' needs a learned pruner, and the plan has none; remove the loss, or use pruner "
            f"learned_gate."
        )


def check_packing(plan: PruningPlan | None, attention: str | None) -> None:
    """Check that packed sequences work, which contain several questions and need a boolean 4-D mask.

    Raises:
        ValueError: a pruner reads the prompt, or the attention implementation does not support such a mask.
    """
    if plan is not None and plan.reads_prompt:
        name = next(stage.pruner.name for stage in plan.stages if stage.pruner.prompt_dependent)
        raise ValueError(f"Pruner '{name}' reads the prompt, but a packed sequence has several; set data pack: false.")
    if attention not in (None, "sdpa"):
        raise ValueError(f"Packed sequences need attention sdpa, got {attention}; set it, or data pack: false.")


def add_lora(model: nn.Module, fields: dict[str, Any], parts: Parts, train: set[str]) -> nn.Module:
    """Wrap a model with PEFT. Fully trained parts become modules_to_save, so that disabling adapters gives the base.

    Args:
        model: the base.
        fields: fields of peft.LoraConfig (DoRA: `use_dora`), or of another tuner's config named by `peft_type`.
        parts: parts of the model.
        train: parts that train fully.

    Raises:
        ValueError: unknown tuner, a tuner that cannot be merged into weights, or invalid fields.
    """
    inside = parts.family.language_model.rpartition(".")[2]
    fields = {"target_modules": rf".*{inside}.*\.(q|k|v|o|gate|up|down)_proj"} | fields
    kind = str(fields.pop("peft_type", "LORA")).upper()
    mergeable = sorted(str(t.value) for t, c in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(c, BaseTuner))
    if kind not in mergeable:
        raise ValueError(f"lora: no tuner '{kind}' whose weights can be merged; choose from {', '.join(mergeable)}.")
    config: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    whole = [getattr(parts.family, name).rpartition(".")[2] for name in TRAINABLE if name in train]
    if whole:
        fields["modules_to_save"] = sorted({*(fields.get("modules_to_save") or []), *whole})
    try:
        wrapped = get_peft_model(model, config(**fields))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error).removeprefix(f"{config.__name__}.__init__() ")
        raise ValueError(f"lora: {reason}; it takes the fields of peft.{config.__name__}.") from error
    _check_merges(wrapped, kind)
    return wrapped


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
