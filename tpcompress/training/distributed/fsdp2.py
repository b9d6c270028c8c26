"""FSDP2: weights, gradients and optimizer states sharded over the ranks; pruners are not sharded.

With sharded weights every rank must call the same modules in the same order, because each call is a collective. A batch
without an image therefore gets a blank one that no loss reads (`blank_image.py`). A pruner may be skipped on one rank
alone, where an image already fits the budget. Its few weights are therefore replicated, and their gradients averaged
before the optimizer step (`gradients.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from tpcompress.families import Parts
from tpcompress.insertion.attach import attachment_of, is_attached


class FSDP2(ModelParallelStrategy):
    """Lightning strategy for FSDP2 over all ranks, with checkpoints of one file.

    The file contains the trained weights, gathered on the first rank. It is read, resumed and exported like any other
    checkpoint, also on another number of ranks.

    Args:
        process_group_backend: backend of torch.distributed; null for the default of the device.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """Set the data-parallel size to the number of ranks, which Lightning's strategy takes as an argument."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every rank, without loading it into the model."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the rank's shard of the weights."""
        assert self.model is not None
        set_model_state_dict(
            self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True, strict=strict)
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The unsharded state. Lightning's version adds a state for weights that have not trained yet."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        full = {number: {name: _full(x) for name, x in values.items()} for number, values in state["state"].items()}
        return state | {"state": full} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the rank's shard of the optimizer states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            own = dict(zip(numbers, [p for group in optimizer.param_groups for p in group["params"]], strict=True))
            sharded = {
                number: {name: _sharded_like(own[number], value) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": sharded})


def shard(model: nn.Module, parts: Parts, mesh: DeviceMesh) -> None:
    """Shard a model in place: one group per decoder layer, and one for everything else.

    Args:
        model: model with LoRA and plan attached, and with `requires_grad` as it trains.
        parts: parts of the model.
        mesh: mesh of one dimension over the ranks that share the weights.
    """
    pruners: set[nn.Parameter] = set()
    watched: frozenset[int] = frozenset()
    if is_attached(model):
        attachment = attachment_of(model)
        pruners, watched = set(attachment.pruners.parameters()), attachment.settings.placement.watched
    for parameter in pruners:
        parameter.data = parameter.data.to(mesh.device_type)
    for index, layer in enumerate(parts.layers):
        # A stage reads keys of the layer before it after that layer has run, so its weights stay gathered.
        fully_shard(layer, mesh=mesh, reshard_after_forward=index not in watched, ignored_params=pruners)
        type(layer).__copy__ = _shallow_copy  # type: ignore[attr-defined]  # stages run a shallow copy of a layer
    # Towers get no group of their own: a call may run one tower for images and again for videos, and transformers
    # records hidden states by the class of a module, which sharding replaces.
    fully_shard(model, mesh=mesh, ignored_params=pruners)


def _shallow_copy(layer: nn.Module) -> nn.Module:
    """`copy.copy` of a sharded layer, whose class would create a new layer; it shares weights and hooks."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    return twin


def _full(value: Any) -> Any:
    """A tensor of an optimizer state on the host, gathered if it is sharded; other values unchanged."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _sharded_like(parameter: nn.Parameter, value: Any) -> Any:
    """A tensor of an optimizer state, sharded as its parameter. Every rank has the full tensor, so nothing is sent."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
