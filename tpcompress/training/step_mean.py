"""Makes the loss of an optimizer step one mean over its answer tokens, across accumulated batches and ranks.

Lightning and the strategies average the losses of accumulated batches and of ranks as if each batch held equally many
answer tokens. The number of tokens of a step is known only after its last batch has been read, so the losses are
multiplied by their own number of tokens, and the gradients are divided by the total before they are checked and
clipped. This costs one all-reduce of a number per step, and no batch is held back.

A loss that is not a mean over answer tokens, such as one on gates, counts as the answer tokens of its batch do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompress.training.passes import Pass

AVERAGES = ("tokens", "samples")

SCALE = 64.0
"""Divides the number of tokens of a batch, so that the loss that is scaled for fp16 stays near its mean. A power of
two, because its effect on the gradients must cancel exactly."""


def check_average(value: str) -> str:
    """The value, if it is one of `AVERAGES`.

    Raises:
        ValueError: it is not.
    """
    if value not in AVERAGES:
        raise ValueError(f"average_over is {' or '.join(AVERAGES)}, got {value!r}.")
    return value


class StepMean:
    """Weights of the batches of one optimizer step.

    Args:
        average_over: what a batch counts by: its answer `tokens`, or its `samples`.
    """

    def __init__(self, average_over: str) -> None:
        self.average_over = average_over
        self.total: float | Tensor = 0.0
        self._loss_scale: tuple[Any, float] | None = None  # of DeepSpeed, to be restored after the step

    def weighed(self, trainer: L.Trainer, loss: Tensor, student: Pass) -> Tensor:
        """The loss of one batch times its weight, which is added to the total of the step.

        Args:
            trainer: trainer of the run.
            loss: mean over the batch.
            student: pass of the batch.
        """
        if not _several(trainer):
            return loss
        weight = student.num_answered() if self.average_over == "samples" else float(len(student.targets_A))
        self.total = self.total + weight
        return loss * (weight / SCALE)

    def rescale(self, trainer: L.Trainer, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients of a step by its total weight: after its last backward pass, before they are clipped.

        DeepSpeed keeps gradients in buffers of its own and divides them by its loss scale within its step, before it
        clips them. Its loss scale contains the total until `restore`.

        Args:
            trainer: trainer of the run.
            parameters: parameters that train.

        Raises:
            ValueError: DeepSpeed runs without ZeRO.
        """
        engine: Any = trainer.model if hasattr(trainer.strategy, "zero_stage_3") else None
        if not _several(trainer) or (engine is not None and not engine.is_gradient_accumulation_boundary()):
            return
        total, self.total = torch.as_tensor(self.total, device=trainer.strategy.root_device), 0.0
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total.clone(), reduce_op="sum")
        parts = trainer.accumulate_grad_batches * trainer.world_size  # by which Lightning and the strategy divided
        if engine is None:
            factor = SCALE * parts / total.clamp(min=1.0)
            for grad in [parameter.grad for parameter in parameters if parameter.grad is not None]:
                (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor.to(grad.dtype))
        else:  # DeepSpeed divides by the number of accumulated batches once more
            factor = SCALE * parts * trainer.accumulate_grad_batches / total.clamp(min=1.0)
            scaler = getattr(engine.optimizer, "loss_scaler", None)
            if scaler is None:
                raise ValueError(
                    f"DeepSpeed's {type(engine.optimizer).__name__} has no loss scale, by which the loss of several "
                    f"batches is averaged over their answer tokens; use ZeRO stage 2 or 3, FSDP2 or ddp."
                )
            self._loss_scale = scaler, float(factor)
            scaler.cur_scale /= float(factor)

    def restore(self) -> None:
        """Restore the loss scale of DeepSpeed after its step."""
        if self._loss_scale is not None:
            scaler, factor = self._loss_scale
            scaler.cur_scale *= factor
            self._loss_scale = None


def _several(trainer: L.Trainer) -> bool:
    """Whether a step has several batches. A single one needs no weight."""
    return trainer.accumulate_grad_batches > 1 or trainer.world_size > 1
