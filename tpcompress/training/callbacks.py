"""Checkpoints that survive interruption, in one place per run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from tpcompress.training.module import NonFiniteLoss


class Checkpoints(ModelCheckpoint):
    """Saves `<default_root_dir>/checkpoints/last.ckpt` as training goes, at its end, and when it is interrupted.

    A loss that is not finite saves nothing: the last good checkpoint stays the last.

    Args:
        every: optimizer steps between two checkpoints.
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__(
            filename="{step}",
            save_last=True,
            save_top_k=1,
            monitor="step",
            mode="max",
            every_n_train_steps=every,
            save_on_exception=True,
            enable_version_counter=False,
        )
        self.every = every

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, NonFiniteLoss):
            super().on_exception(trainer, pl_module, exception)
