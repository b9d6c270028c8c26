"""Norm, clipping and averaging of gradients when some weights are sharded (DTensor) and some are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def average_unsharded(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of unsharded weights over all ranks; a missing gradient counts as 0."""
    for parameter in parameters:
        if isinstance(parameter, DTensor) or not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients, sharded and unsharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = []
    for sharded in (True, False):
        group = [gradient for gradient in gradients if isinstance(gradient, DTensor) is sharded]
        if group:
            norm = torch.nn.utils.get_total_norm(group)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]


def clip_norm(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for a mixture of sharded and unsharded weights."""
    if not any(p.grad is not None for p in parameters):
        return
    factor = (limit / (gradient_norm(parameters) + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)
