"""Checks what trains: parts of the model, and the losses, teachers and plans that fit them."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from tpcompress.data.packing import why_config_not_packed
from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.losses import Loss
from tpcompress.training.optim import group_of
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


def check_packing(
    plan: PruningPlan | None, attention: str | None, config: PretrainedConfig, several_rows: bool = False
) -> None:
    """Check that packed sequences work, which contain several questions and need a boolean 4-D mask.

    Args:
        plan: plan of the run; None without.
        attention: attention implementation; None for the default of transformers.
        config: config of the base.
        several_rows: sequences contain several rows (`pack_sequences`), not only the questions of one.

    Raises:
        ValueError: a pruner reads the prompt, a budget is for a whole prompt, or the attention or the layers of the
            language model do not support such a mask.
    """
    name = "pack_sequences" if several_rows else "pack"
    if plan is not None and plan.reads_prompt:
        pruner = next(stage.pruner.name for stage in plan.stages if stage.pruner.prompt_dependent)
        raise ValueError(
            f"Pruner '{pruner}' reads the prompt, but a packed sequence has several; set data {name}: false."
        )
    if plan is not None and several_rows and plan.scope == "prompt":
        raise ValueError(f"The plan's budget is per prompt, but a packed sequence has several; set data {name}: false.")
    if attention not in (None, "sdpa"):
        raise ValueError(f"Packed sequences need attention sdpa, got {attention}; set it, or data {name}: false.")
    reason = why_config_not_packed(config)
    if reason is not None:
        raise ValueError(f"{name} is not exact here: {reason}; set data {name}: false.")


def mark_trainable(model: nn.Module, parts: Parts, trained: Set[str], adapted: bool, mixed: bool) -> list[nn.Parameter]:
    """Let the weights of a run require a gradient, in training mode, and return them.

    Args:
        model: model with adapters and plan attached; everything but its adapters is frozen.
        parts: parts of the model.
        trained: parts that train in some phase.
        adapted: it has adapters, which then train instead of the parts; only the pruner trains beside them.
        mixed: the run uses mixed precision.
    """
    for name, parameter in model.named_parameters():
        if group_of(name, parts) in trained and (not adapted or "pruner" in name):
            parameter.requires_grad_(True)
    # transformers loads in eval mode and Lightning keeps it, which would disable dropout, gates and checkpointing.
    found = [p for p in model.train().parameters() if p.requires_grad]
    if mixed:
        for parameter in found:  # half-precision weights round small updates to zero
            parameter.data = parameter.data.float()
    return found
