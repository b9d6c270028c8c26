"""Checks for DDP, which waits for the gradient of every weight that it does not know to be unused."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from tpcompress.training.phases import Phase


def check_ddp(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Refuse plain DDP for a run whose phases train different weights, because it would hang in the backward pass.

    Raises:
        ValueError: several phases, and DDP without `find_unused_parameters`.
    """
    # Lightning derives DeepSpeedStrategy from DDPStrategy, but DeepSpeed reduces gradients itself.
    plain = isinstance(trainer.strategy, DDPStrategy) and not isinstance(trainer.strategy, DeepSpeedStrategy)
    if plain and not trainer.strategy._ddp_kwargs.get("find_unused_parameters") and len(phases) > 1:  # type: ignore[attr-defined]
        raise ValueError(
            "Strategy ddp waits for gradients of all weights, and this run's phases train different ones; set "
            "trainer.strategy: ddp_find_unused_parameters_true, as recipes/gpus/ddp.yaml does."
        )
