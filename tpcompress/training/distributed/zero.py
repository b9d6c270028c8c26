"""DeepSpeed ZeRO-3: loading of pretrained weights before they are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning import Trainer


@contextmanager
def unsharded_weights(trainer: Trainer | None) -> Iterator[None]:
    """Create new weights unsharded in a block, where Lightning lets DeepSpeed shard each at once (stage 3).

    transformers cannot load a checkpoint into sharded weights. DeepSpeed shards them when it takes over the model.
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
