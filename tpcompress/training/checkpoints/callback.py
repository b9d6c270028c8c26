"""Callbacks of every run: checkpoints that survive interruption, and a progress bar or progress lines."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpcompress.training.checkpoints.signals import Stopped
from tpcompress.training.checkpoints.storage import (
    PART,
    AtomicCheckpointIO,
    CheckpointNotSaved,
    is_disk_error,
    not_saved_message,
    remove,
    replace_atomically,
)
from tpcompress.training.module import PruningModule
from tpcompress.training.nan_guard import NonFiniteLoss

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Saves `<default_root_dir>/checkpoints/last.ckpt` during training, at its end, and when it is interrupted.

    A checkpoint always lies between two optimizer steps. It is written beside the previous one, flushed and renamed, so
    that neither a killed process nor a full disk destroys the previous one. Nothing is saved after a loss that is not
    finite, or after an exception in a run on several devices, whose ranks may be at different batches.

    Args:
        every: optimizer steps between two checkpoints.

    Raises:
        ValueError: `every` below 1.
        CheckpointNotSaved: the disk could not take the checkpoint, and training stops. If another exception ended the
            run, this is a warning.
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"checkpoints.every must be at least 1 step, got {every}.")
        self.every = every
        self.path = Path()
        self.saved: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if stage == "validate" and hasattr(trainer.strategy, "zero_stage_3"):
            raise ValueError(
                "Lightning removes all hooks of a model that DeepSpeed validates, and the plan with them; use another "
                "strategy, or validate within fit."
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not a plugin of the user
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved = trainer.global_step  # nothing to save before the next step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _rewind(trainer)
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        together = trainer.world_size == 1 or isinstance(exception, Stopped)
        within_step = isinstance(pl_module, PruningModule) and pl_module.in_step
        refused = isinstance(exception, NonFiniteLoss | CheckpointNotSaved)
        if self.saved is None or refused or within_step or not together:
            return
        _rewind(trainer)
        try:
            self._save(trainer)
        except CheckpointNotSaved as error:  # the user must see the exception that ended the run
            log.warning("%s", error)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        part = self.path.with_name(self.path.name + PART)
        failure: BaseException | None = None
        try:
            trainer.save_checkpoint(part)
        except BaseException as error:  # torch's sharded checkpoints raise a BaseException
            failure = error
            trainer.strategy.barrier()  # ranks that succeeded wait here
        if failure is None and trainer.is_global_zero:
            try:
                replace_atomically(self.path)
            except OSError as error:
                failure = error
        # All ranks stop together, because the others would wait for a rank that stops alone.
        if not trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            if trainer.is_global_zero:
                remove(part)
            if failure is not None and not is_disk_error(failure):
                raise failure
            raise CheckpointNotSaved(
                not_saved_message(self.path, failure or OSError("another rank failed"))
            ) from failure
        self.saved = trainer.global_step


class StepProgress(ProgressBar):
    """Shows steps, loss and vision tokens: a bar on a terminal, otherwise a line every `log_every_n_steps`."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self.enabled = True
        self.bar: Progress | None = None
        self.started, self.first = 0.0, 0

    def enable(self) -> None:
        """Show progress."""
        self.enabled = True

    def disable(self) -> None:
        """Hide progress; Lightning calls this on all ranks but the first."""
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started, self.first = time.perf_counter(), trainer.global_step
        if self.enabled and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=self.console)
            self.bar.add_task("", total=int(trainer.estimated_stepping_batches), completed=trainer.global_step)
            self.bar.start()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not self.enabled or not stepped:
            return
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, description=_describe(trainer))
        elif step % every == 0 or step == total:
            pace = (time.perf_counter() - self.started) / max(1, step - self.first)
            self.console.print(f"step {step}/{total} · {_describe(trainer)} · {pace:.2f} s per step", highlight=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.enabled and not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            at = f"step {trainer.global_step} · " if trainer.state.fn == "fit" else ""
            loss = float(trainer.callback_metrics["val/loss"])
            self.console.print(f"{at}validation loss {loss:.4f}", highlight=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _describe(trainer: L.Trainer) -> str:
    values = trainer.callback_metrics
    parts = [f"loss {float(values['loss/total']):.3f}"] if "loss/total" in values else []
    if "vision_tokens" in values:
        each, all_ = (f"{float(values[name]):.0f}" for name in ("vision_tokens", "vision_tokens_per_sequence"))
        parts.append(f"{all_} vision tokens" + ("" if each == all_ else f" per sequence, {each} per image"))
    return " · ".join(parts)


def _rewind(trainer: L.Trainer) -> None:
    """Count batches since the last optimizer step as not done, because their gradients are not in the checkpoint."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    if done < trainer.num_training_batches:
        done -= done % trainer.accumulate_grad_batches
    for name in ("ready", "started", "processed", "completed"):
        undone = getattr(progress.current, name) - done
        if undone > 0:
            setattr(progress.current, name, done)
            setattr(progress.total, name, getattr(progress.total, name) - undone)
