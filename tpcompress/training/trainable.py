"""What trains in a run: parts of the model, adapters of PEFT, checked."""

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
"""Parts of a model, in the order of the tensor."""


def read_plan(plan: dict[str, Any] | str | None) -> PruningPlan | None:
    """A plan from a recipe: any form that `PruningPlan.of` reads, or nothing."""
    return None if plan is None else PruningPlan.of(plan)


def check_train(train: list[str] | str, lora: dict[str, Any] | None, plan: PruningPlan | None) -> set[str]:
    """The parts that train in the main phase; `pruner` among them if it learns jointly with the rest.

    Raises:
        ValueError: unknown part, LoRA together with a part that it adapts, `pruner` without one that learns, or nothing
            to train.
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
    """See that there is a loss, a teacher exactly where one is imitated, and a learned pruner for those on its choice.

    Raises:
        ValueError: there is not.
    """
    if not losses:
        raise ValueError("losses is empty; leave it out for the label loss, or name one, e.g. [Label, KL].")
    lonely = [loss.name for loss in losses if "teacher" in loss.needs]
    if lonely and teacher is None:
        raise ValueError(f"Loss '{lonely[0]}' imitates a teacher; set model.teacher, e.g. AdapterOff or FrozenCopy.")
    if teacher is not None and not lonely:
        raise ValueError(
            f"Teacher '{type(teacher).__name__}' has nobody to teach: no loss imitates it. Add KL, JSD or Hidden to "
            f"model.losses, or drop model.teacher."
        )
    idle = [loss.name for loss in losses if "gate" in loss.needs]
    if idle and not is_learned(plan):
        raise ValueError(
            f"Loss '{idle[0]}' is on the choice of a learned pruner, and the plan has none; drop the loss, or plan "
            f"learned_gate."
        )


def check_packing(plan: PruningPlan | None, attention: str | None) -> None:
    """Packed sequences hold several questions and bring a boolean 4-D mask.

    Raises:
        ValueError: a pruner reads the question, or the attention implementation does not take such a mask.
    """
    if plan is not None and plan.reads_prompt:
        name = next(stage.pruner.name for stage in plan.stages if stage.pruner.prompt_dependent)
        raise ValueError(
            f"Pruner '{name}' scores tokens by the question, but packed sequences hold several; set data pack: false."
        )
    if attention not in (None, "sdpa"):
        raise ValueError(f"Packed sequences need attention sdpa, got {attention}; set it, or data pack: false.")


def add_lora(model: nn.Module, fields: dict[str, Any], parts: Parts, train: set[str]) -> nn.Module:
    """Wrap a model with PEFT; parts that train whole become modules_to_save, so that adapter-off is the exact base.

    Args:
        model: the base.
        fields: of peft.LoraConfig (DoRA: `use_dora`), or of another tuner's config with its name as `peft_type`.
        parts: of the model.
        train: parts that train whole.

    Raises:
        ValueError: a tuner that PEFT does not have or that cannot be merged into weights, or fields that it refuses.
    """
    inside = parts.family.language_model.rpartition(".")[2]
    fields = {"target_modules": rf".*{inside}.*\.(q|k|v|o|gate|up|down)_proj"} | fields
    kind = str(fields.pop("peft_type", "LORA")).upper()
    mergeable = sorted(str(t.value) for t, c in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(c, BaseTuner))
    if kind not in mergeable:
        raise ValueError(f"lora: no tuner '{kind}' whose weights can be merged; choose of {', '.join(mergeable)}.")
    config: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    whole = [getattr(parts.family, name).rpartition(".")[2] for name in TRAINABLE if name in train]
    if whole:
        fields["modules_to_save"] = sorted({*(fields.get("modules_to_save") or []), *whole})
    try:
        made = get_peft_model(model, config(**fields))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error).removeprefix(f"{config.__name__}.__init__() ")
        raise ValueError(f"lora: {reason}; it takes the fields of peft.{config.__name__}.") from error
    _check_merges(made, kind)
    return made


def _check_merges(model: nn.Module, kind: str) -> None:
    """Merge a copy of the smallest adapted layer: better no run than one that cannot be exported.

    Raises:
        ValueError: PEFT cannot merge it.
    """
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # A quantised base is merged into its own weights, at the export; what is not loaded cannot be tried.
    plain = [m for m in adapted if all(p.is_floating_point() and not p.is_meta for p in m.parameters())]
    if not plain:
        return
    layer: Any = copy.deepcopy(min(plain, key=lambda module: sum(p.numel() for p in module.parameters())))
    try:
        layer.merge()
    except Exception as error:  # each tuner has its own way to fail
        raise ValueError(
            f"lora: {kind} adapters cannot be merged, so not exported ({first_line(error)}); take LORA."
        ) from error
