"""Records the probe of a run for its checkpoints, from the weights that they contain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tpcompress.errors import first_line
from tpcompress.export.probe import default_inputs
from tpcompress.export.trained_probe import try_to_record
from tpcompress.training.steps import set_progress_done


class ProbeOfRun:
    """Records what the model of a run answers to the probe's input: one prefill of one image.

    With sharded weights the call is a collective, in which all ranks take part, as they do in saving.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] | None = None
        self.reason = ""

    def record(self, module: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The answer as plain values, or {"reason": ...} if there is none.

        Args:
            module: the LightningModule of the run.
            weights: weights in the checkpoint by their name in the module; they differ from the model's if a callback
                averages them.
        """
        if self.inputs is None and not self.reason:
            try:
                self.inputs = default_inputs(module.processor)
            except ValueError as error:
                self.reason = first_line(error)
        if self.inputs is None:
            return {"reason": self.reason}
        set_progress_done(module.model)
        trainer = module.trainer
        with _weights(module, weights), trainer.precision_plugin.forward_context():
            found = try_to_record(module.model, self.inputs, str(trainer.precision))
        for part in module.model.modules():
            if isinstance(part, FSDPModule):  # a call without a backward pass leaves weights gathered
                part.reshard()
        return found


@contextmanager
def _weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a block with other weights, where they are not the model's own."""
    own = dict(module.named_parameters())
    other = {
        name: value
        for name, value in weights.items()
        if name in own and not isinstance(own[name], DTensor) and value.shape == own[name].shape
    }
    before = {name: own[name].data for name, value in other.items() if value.data_ptr() != own[name].data_ptr()}
    try:
        for name in before:
            own[name].data = other[name].to(own[name].device, own[name].dtype)
        yield
    finally:
        for name, data in before.items():
            own[name].data = data
