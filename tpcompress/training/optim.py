"""AdamW with one parameter group per part of the model, and a warm-up-cosine learning rate per phase."""

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
    """Settings of AdamW and of its learning rate.

    Attributes:
        lr: peak learning rate of the language model or its adapters.
        projector_lr: peak learning rate of the projector; null for `lr`.
        vision_tower_lr: peak learning rate of the vision tower; null for `lr`.
        pruner_lr: peak learning rate of a learned pruner.
        weight_decay: decoupled weight decay of matrices; vectors (norms, biases) and the pruner have none.
        betas: beta 1 and beta 2 of AdamW.
        warmup: steps of linear warm-up at the start of each phase.
        final: learning rate at the end of the cosine, as a share of the peak.
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
    """The part of the model to which a parameter belongs, from its dotted name."""
    if "token_pruners." in name:
        return "pruner"
    for group in ("projector", "vision_tower"):
        if f"{getattr(parts.family, group).rpartition('.')[2]}." in name:
            return group
    return "language_model"


def build_optimizer(model: nn.Module, parts: Parts, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over all weights that train in some phase, in groups named `<part>` and `<part>.no_decay`.

    Raises:
        ValueError: no weight requires a gradient.
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
    """One warm-up and cosine per phase for every group that trains in it; learning rate 0 in other phases."""

    def curve(phase: Phase, step: int) -> float:
        done = (step - phase.start) / max(1, phase.end - phase.start)
        ramp = min(1.0, (step - phase.start + 1) / max(1, settings.warmup))
        return ramp * (settings.final + (1 - settings.final) * (1 + math.cos(math.pi * done)) / 2)

    def of_group(name: str) -> Callable[[int], float]:
        own = [phase for phase in phases if (phase.pruner if name.startswith("pruner") else phase.rest)]
        return lambda step: next((curve(p, step) for p in own if p.start <= step < p.end), 0.0)

    return LambdaLR(optimizer, [of_group(group["name"]) for group in optimizer.param_groups])
