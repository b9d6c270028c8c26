"""FSDP2: weights, gradients and optimizer states of the model cut over the processes; pruners stay whole on each.

Under sharding every process must call the same modules in the same order, because each call gathers weights from all.
A batch without a picture therefore gets one that no loss sees (`dummy`). A pruner may be left out on one process alone,
where an image already fits the budget, so its few weights are not cut: each process has them, and their gradients are
averaged before the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from tpcompress.insertion.attach import controller_of, is_attached

if TYPE_CHECKING:
    from lightning import Trainer
    from torch.distributed.device_mesh import DeviceMesh

    from tpcompress.families import Parts
    from tpcompress.training.phases import Phase


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all processes of the run and with checkpoints of one file.

    The file holds what trains, gathered on the first process: it is read, resumed and exported like any other, also on
    another number of processes.

    Args:
        process_group_backend: of torch.distributed; null takes that of the device.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """As Lightning's, which asks for the number of processes a second time."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: `load_optimizer_state_dict` does it."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every process; nothing is loaded into the model yet."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its cut of the weights."""
        assert self.model is not None
        set_model_state_dict(
            self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True, strict=strict)
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as one process has it. Lightning's gives a state to weights that have not trained yet."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        whole = {number: {name: _whole(x) for name, x in values.items()} for number, values in state["state"].items()}
        return state | {"state": whole} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its cut of the optimizers' states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            mine = dict(zip(numbers, [p for group in optimizer.param_groups for p in group["params"]], strict=True))
            cut = {
                number: {name: _cut_like(mine[number], value) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": cut})


def shard(model: nn.Module, parts: Parts, mesh: DeviceMesh) -> None:
    """Cut a model in place: each decoder layer for itself, and all that is left together.

    Args:
        model: with LoRA and plan attached, and with `requires_grad` as it trains.
        parts: of the model.
        mesh: one dimension, the processes that share the weights.
    """
    pruners: set[nn.Parameter] = set()
    watched: frozenset[int] = frozenset()
    if is_attached(model):
        controller = controller_of(model)
        pruners, watched = set(controller.pruners.parameters()), controller.settings.placement.watched
    for parameter in pruners:
        parameter.data = parameter.data.to(mesh.device_type)
    for index, layer in enumerate(parts.layers):
        # A pruner asks the layer before its stage for keys, when that layer has run already.
        fully_shard(layer, mesh=mesh, reshard_after_forward=index not in watched, ignored_params=pruners)
        type(layer).__copy__ = _shallow  # type: ignore[attr-defined]  # a pruner looks through a shallow copy of a layer
    # The rest is one group. Towers have none of their own: a call may run one once for images and once for videos, and
    # transformers records hidden states by the class of a model, which sharding replaces.
    fully_shard(model, mesh=mesh, ignored_params=pruners)


@contextmanager
def whole_weights(trainer: Trainer | None) -> Iterator[None]:
    """Make new weights whole in a block, where Lightning has DeepSpeed cut each at once (stage 3).

    A checkpoint of transformers cannot be loaded into cut weights. DeepSpeed cuts them when it takes over the model.
    """
    if trainer is None or not getattr(trainer.strategy, "zero_stage_3", False):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def calls_alike(trainer: Trainer) -> bool:
    """Whether all processes must call the same modules: FSDP2 and DeepSpeed.

    Also at stage 2, where weights are whole: a process without a gradient for some weight sums other buckets than the
    rest, which hang, or sum what does not belong together.
    """
    return trainer.lightning_module.device_mesh is not None or hasattr(trainer.strategy, "zero_stage_3")


def check_ddp(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """See that plain DDP does not wait for gradients of what a phase leaves alone: it would hang, or stop deep inside.

    Raises:
        ValueError: the run has phases in which different weights train, and DDP is not told to look for unused ones.
    """
    plain = isinstance(trainer.strategy, DDPStrategy)
    if plain and not trainer.strategy._ddp_kwargs.get("find_unused_parameters") and len(phases) > 1:  # type: ignore[attr-defined]
        raise ValueError(
            "Strategy ddp waits for gradients of all weights, and this run's phases train different ones; set "
            "trainer.strategy: ddp_find_unused_parameters_true, as recipes/llava15_7b/ddp.yaml does."
        )


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


def _whole(value: Any) -> Any:
    """A tensor of a state on the host, gathered if it is cut."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _cut_like(parameter: nn.Parameter, value: Any) -> Any:
    """A whole tensor of a state, cut as its parameter is. Every process has it whole, so nothing is sent."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
