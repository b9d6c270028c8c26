"""AdamW with one group per part of the model, and a warm-up-cosine learning rate per phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tpcompress.families import Parts
from tpcompress.training.phases import Phase

GROUPS = ("pruner", "projector", "vision_tower", "language_model")


@dataclass(frozen=True)
class Optimizer:
    """Learning rates and schedule.

    Attributes:
        lr: peak learning rate of the language model, or of its adapters.
        projector_lr: peak learning rate of the projector; None takes `lr`.
        vision_tower_lr: peak learning rate of the vision tower; None takes `lr`.
        pruner_lr: peak learning rate of a learned pruner.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) and the pruner have none.
        betas: AdamW's averages.
        warmup: steps of linear warm-up at the start of each phase.
        final: share of the peak that the cosine ends at.
    """

    lr: float = 2e-5
    projector_lr: float | None = None
    vision_tower_lr: float | None = None
    pruner_lr: float = 2e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 20
    final: float = 0.01

    def peak(self, group: str) -> float:
        """Peak learning rate of a group."""
        special = {"pruner": self.pruner_lr, "projector": self.projector_lr, "vision_tower": self.vision_tower_lr}.get(
            group
        )
        return self.lr if special is None else special


def group_of(name: str, parts: Parts) -> str:
    """The part of the model that a parameter belongs to, by its dotted name."""
    if "token_pruners." in name:
        return "pruner"
    for group in ("projector", "vision_tower"):
        if f"{getattr(parts.family, group).rpartition('.')[2]}." in name:
            return group
    return "language_model"


def build_optimizer(model: nn.Module, parts: Parts, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over everything that will ever train, in groups named `<part>` and `<part>.no_decay`.

    Raises:
        ValueError: nothing trains.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name, parts)
            plain = parameter.ndim < 2 or group == "pruner"
            groups.setdefault(f"{group}.no_decay" if plain else group, []).append(parameter)
    if not groups:
        raise ValueError("Nothing trains: `train` is empty, there is no LoRA and the pruner has no weights.")
    options = [
        {
            "name": name,
            "params": parameters,
            "lr": settings.peak(name.partition(".")[0]),
            "weight_decay": 0.0 if name.endswith("no_decay") else settings.weight_decay,
        }
        for name, parameters in groups.items()
    ]
    return torch.optim.AdamW(options, betas=settings.betas)


def warmup_cosine(optimizer: torch.optim.Optimizer, settings: Optimizer, phases: Sequence[Phase]) -> LambdaLR:
    """For every group, one warm-up and cosine over each phase in which it trains, and 0 elsewhere."""

    def curve(phase: Phase, step: int) -> float:
        done = (step - phase.start) / max(1, phase.end - phase.start)
        ramp = min(1.0, (step - phase.start + 1) / max(1, settings.warmup))
        return ramp * (settings.final + (1 - settings.final) * (1 + math.cos(math.pi * done)) / 2)

    def of_group(name: str) -> Callable[[int], float]:
        own = [phase for phase in phases if (phase.pruner if name.startswith("pruner") else phase.rest)]
        return lambda step: next((curve(p, step) for p in own if p.start <= step < p.end), 0.0)

    return LambdaLR(optimizer, [of_group(group["name"]) for group in optimizer.param_groups])
