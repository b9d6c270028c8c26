"""FSDP2: weights, gradients and optimizer states of the model cut over the processes; pruners stay whole on each.

Under sharding every process must call the same modules in the same order, because each call gathers weights from all.
A batch without a picture therefore gets one that no loss sees (`dummy`). A pruner may be left out on one process alone,
where an image already fits the budget, so its few weights are not cut: each process has them, and their gradients are
averaged before the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tpcompress.insertion.attach import controller_of, is_attached

if TYPE_CHECKING:
    from lightning import Trainer
    from torch.distributed.device_mesh import DeviceMesh

    from tpcompress.families import Parts


def shard(model: nn.Module, parts: Parts, mesh: DeviceMesh) -> None:
    """Cut a model in place: each decoder layer for itself, and all that is left together.

    Args:
        model: with LoRA and plan attached, and with `requires_grad` as it trains.
        parts: of the model.
        mesh: one dimension, the processes that share the weights.
    """
    pruners: set[nn.Parameter] = set()
    watched: set[int] = set()
    if is_attached(model):
        controller = controller_of(model)
        pruners, watched = set(controller.pruners.parameters()), controller.watched
    for parameter in pruners:
        parameter.data = parameter.data.to(mesh.device_type)
    for index, layer in enumerate(parts.layers):
        # A pruner asks the layer before its stage for keys, when that layer has run already.
        fully_shard(layer, mesh=mesh, reshard_after_forward=index not in watched, ignored_params=pruners)
        type(layer).__copy__ = _shallow  # type: ignore[attr-defined]  # a pruner looks through a shallow copy of a layer
    # The rest is one group. Towers have none of their own: a call may run one once for images and once for videos, and
    # transformers records hidden states by the class of a model, which sharding replaces.
    fully_shard(model, mesh=mesh, ignored_params=pruners)


def cuts_weights(trainer: Trainer) -> bool:
    """Whether no process holds whole weights: FSDP2, or stage 3 of DeepSpeed."""
    strategy = trainer.strategy
    return trainer.lightning_module.device_mesh is not None or bool(getattr(strategy, "zero_stage_3", False))


def average_whole(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of the weights that are not cut over all processes; where one has none, it counts as 0."""
    for parameter in parameters:
        if isinstance(parameter, DTensor) or not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients, of cut and of whole weights."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = []
    for cut in (True, False):
        mine = [gradient for gradient in gradients if isinstance(gradient, DTensor) is cut]
        if mine:
            norm = torch.nn.utils.get_total_norm(mine)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]


def clip_norm(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for weights of which some are cut and some are whole."""
    if not any(p.grad is not None for p in parameters):
        return
    factor = (limit / (gradient_norm(parameters) + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)


def _shallow(layer: nn.Module) -> nn.Module:
    """`copy.copy` of a cut layer, whose class would make a new layer instead; it shares weights and hooks."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    return twin
