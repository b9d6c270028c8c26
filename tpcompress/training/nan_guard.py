"""Stops training at the first loss or gradient that is NaN or infinite, before the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn

from tpcompress.training.distributed.gradients import gradient_norm


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient is NaN or infinite; raised before the optimizer step, so the weights are unchanged."""


def check_loss(trainer: L.Trainer, loss: Tensor, losses: dict[str, Tensor]) -> None:
    """Stop all ranks if the loss of one is not finite.

    Raises:
        NonFiniteLoss: the loss is not finite; the message lists its terms.
    """
    finite = bool(torch.isfinite(loss))
    if trainer.world_size > 1:
        finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
    if not finite:
        values = ", ".join(f"{name} {float(value.detach()):g}" for name, value in losses.items())
        raise NonFiniteLoss(_message("loss", trainer.global_step, values))


def check_gradients(trainer: L.Trainer, parameters: Sequence[nn.Parameter]) -> None:
    """Check the gradient norm, which can be infinite for a finite loss. The fp16 scaler skips such steps by itself.

    Raises:
        NonFiniteLoss: the norm is not finite.
    """
    if trainer.scaler is None and any(p.grad is not None for p in parameters):
        norm = float(gradient_norm(parameters))
        if not math.isfinite(norm):
            raise NonFiniteLoss(_message("gradient", trainer.global_step, f"norm {norm:g}"))


def _message(what: str, step: int, values: str) -> str:
    return (
        f"The {what} is not finite at step {step} ({values}); the last checkpoint is intact. Resume from it with a "
        f"lower learning rate, or train in bf16 or fp32 instead of fp16."
    )
