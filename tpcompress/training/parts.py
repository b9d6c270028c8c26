"""The groups of settings of a training run, checked: what trains, LoRA, distillation, the scorer's phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners import Pruner, create
from tpcompress.training.schedules import Schedule

TRAINABLE = ("vision_tower", "projector", "language_model")
TEACHERS = ("auto", "adapter_off", "copy")


@dataclass(frozen=True)
class Distill:
    """KL to the unpruned teacher on the answer tokens.

    Attributes:
        weight: of the KL beside the label loss.
        temperature: softens both sides; the loss is scaled by its square.
        teacher: `adapter_off` is this model with LoRA and plan off (no second copy of the weights), `copy` a frozen
            copy of the base, `auto` the first where there is LoRA.
    """

    weight: float = 0.5
    temperature: float = 1.0
    teacher: str = "auto"

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.temperature <= 0:
            raise ValueError(f"distill needs weight > 0 and temperature > 0, got {self.weight} and {self.temperature}.")
        if self.teacher not in TEACHERS:
            raise ValueError(f"distill has no teacher '{self.teacher}'; choose one of {', '.join(TEACHERS)}.")


@dataclass(frozen=True)
class Scorer:
    """Phase one: the scorer of a learned pruner, alone, at full length.

    Attributes:
        steps: optimizer steps of the phase; null takes half the run if the plan has something to learn, else none.
        schedule: budgets of the phase; null keeps the plan's. Random budgets help a question-conditioned scorer.
        budget_weight: of the squared distance of the mean gate from the keep ratio, for gates that are not exact.
        warm_up_steps: first steps in which the scores also imitate the choice of `warm_up_pruner`.
        warm_up_pruner: a pruner without weights that reads nothing but the vision tokens.
        warm_up_weight: of that imitation.
    """

    steps: int | None = None
    schedule: Schedule | None = None
    budget_weight: float = 0.0
    warm_up_steps: int = 0
    warm_up_pruner: str = "divprune"
    warm_up_weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.budget_weight, self.warm_up_steps, self.warm_up_weight) < 0:
            raise ValueError(
                f"scorer: budget_weight, warm_up_steps and warm_up_weight are at least 0, got {self.budget_weight}, "
                f"{self.warm_up_steps} and {self.warm_up_weight}."
            )
        self.guide()

    def count(self, plan: PruningPlan | None, total: int) -> int:
        """Optimizer steps of phase one in a run of `total`.

        Raises:
            ValueError: more steps than the run has, or none although a pruner must learn.
        """
        learned = plan is not None and any(stage.rule.learned for stage in plan.stages)
        steps = (total // 2 if learned else 0) if self.steps is None else self.steps
        if steps > total or (learned and steps < 1):
            raise ValueError(
                f"The scorer's phase has {steps} of {total} steps; set model.scorer.steps between 1 and {total}."
            )
        return steps if learned else 0

    def guide(self) -> Pruner:
        """The pruner to imitate.

        Raises:
            ValueError: it has weights, or needs more than the vision tokens.
        """
        pruner = create(self.warm_up_pruner)
        if pruner.learned or pruner.needs:
            raise ValueError(
                f"warm_up_pruner '{self.warm_up_pruner}' must have no weights and read vision tokens only."
            )
        return pruner


def read_plan(plan: dict[str, Any] | str | None) -> PruningPlan | None:
    """A plan from a recipe: a mapping, the path of a file, or nothing."""
    if plan is None:
        return None
    return PruningPlan.from_file(plan) if isinstance(plan, str) else PruningPlan.from_dict(plan)


def check_train(train: list[str] | str, lora: dict[str, Any] | None, plan: PruningPlan | None) -> set[str]:
    """The parts that train.

    Raises:
        ValueError: unknown part, LoRA together with a part that it adapts, or nothing to train.
    """
    names = [train] if isinstance(train, str) else list(train)
    parts = set(TRAINABLE) if names == ["full"] else set(names)
    unknown = sorted(parts - set(TRAINABLE))
    if unknown:
        raise ValueError(f"train: unknown part {', '.join(unknown)}; choose of {', '.join(TRAINABLE)}, or full.")
    if lora is not None:
        if names == ["full"]:
            parts = set()
        if "language_model" in parts:
            raise ValueError("train: language_model and lora exclude each other; drop one of them.")
    elif not parts and not (plan and any(stage.rule.learned for stage in plan.stages)):
        raise ValueError(
            f"Nothing trains: train is empty and there is no lora; choose of {', '.join(TRAINABLE)}, or full."
        )
    return parts


def check_packing(plan: PruningPlan | None, attention: str | None) -> None:
    """Packed sequences hold several questions and bring a boolean 4-D mask.

    Raises:
        ValueError: a pruner reads the question, or the attention implementation does not take such a mask.
    """
    if plan is not None and plan.reads_prompt:
        name = next(stage.rule.name for stage in plan.stages if stage.rule.prompt_dependent)
        raise ValueError(
            f"Pruner '{name}' scores tokens by the question, but packed sequences hold several; set data pack: false."
        )
    if attention not in (None, "sdpa"):
        raise ValueError(f"Packed sequences need attention sdpa, got {attention}; set it, or data pack: false.")


def add_lora(model: nn.Module, fields: dict[str, Any], parts: Parts, train: set[str]) -> nn.Module:
    """Wrap a model with PEFT; parts that train whole become modules_to_save, so that adapter-off is the exact base.

    Raises:
        ValueError: fields that peft.LoraConfig refuses.
    """
    inside = parts.family.language_model.rpartition(".")[2]
    fields = {"target_modules": rf".*{inside}.*\.(q|k|v|o|gate|up|down)_proj"} | fields
    whole = [getattr(parts.family, name).rpartition(".")[2] for name in sorted(train)]
    if whole:
        fields["modules_to_save"] = sorted({*(fields.get("modules_to_save") or []), *whole})
    try:
        return get_peft_model(model, LoraConfig(**fields))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("LoraConfig.__init__() ")
        raise ValueError(f"lora: {reason}; it takes the fields of peft.LoraConfig.") from error
