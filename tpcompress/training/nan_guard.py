"""Stop at the first loss or gradient that is not a number, before the step that would spread it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn

from tpcompress.training.distributed.sharding import gradient_norm


class NonFiniteLoss(ArithmeticError):
    """Loss or gradient became NaN or infinite; training stops before the step that would spread it."""


def check_loss(trainer: L.Trainer, loss: Tensor, losses: dict[str, Tensor]) -> None:
    """Stop all ranks if one has a loss that is not finite.

    Raises:
        NonFiniteLoss: with the terms of the loss.
    """
    finite = bool(torch.isfinite(loss))
    if trainer.world_size > 1:
        finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
    if not finite:
        values = ", ".join(f"{name} {float(value.detach()):g}" for name, value in losses.items())
        raise NonFiniteLoss(_message("loss", trainer.global_step, values))


def check_gradients(trainer: L.Trainer, parameters: Sequence[nn.Parameter]) -> None:
    """A finite loss can have a gradient that is not; fp16's scaler expects that and skips the step.

    Raises:
        NonFiniteLoss: with the norm of the gradient.
    """
    if trainer.scaler is None and any(p.grad is not None for p in parameters):
        norm = float(gradient_norm(parameters))
        if not math.isfinite(norm):
            raise NonFiniteLoss(_message("gradient", trainer.global_step, f"norm {norm:g}"))


def _message(what: str, step: int, values: str) -> str:
    return (
        f"The {what} is not finite at step {step} ({values}); the last checkpoint is untouched. Resume from it with a "
        f"lower learning rate, or train in bf16 or fp32 instead of fp16."
    )
