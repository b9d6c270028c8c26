"""What `tpcompress fit` says at its end: where the run is, and the command that exports it."""

from __future__ import annotations

import shlex
from pathlib import Path

import lightning as L

from tpcompress.training.checkpoints.callback import Checkpoints
from tpcompress.training.module import PruningModule


def following(trainer: L.Trainer, module: PruningModule) -> str:
    """One line about a run that ended without an error.

    Args:
        trainer: its trainer.
        module: its module.
    """
    folder = trainer.default_root_dir
    done, steps, early, flags = trainer.global_step, module.total_steps, "", ""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "Ran without an error; fast_dev_run saves nothing."
    if not done:
        return "No step was taken, so nothing was saved; set trainer.max_steps or trainer.max_epochs."
    if not any(isinstance(callback, Checkpoints) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return f"Trained {done} steps; nothing was saved, because trainer.enable_checkpointing is false."
    if done < steps:
        early, flags = f" up to step {done} of {steps}", " --allow-unfinished"
    out = shlex.quote(str(Path(folder, "export")))
    return f"Trained{early}: {folder}. Next: tpcompress export --ckpt {shlex.quote(folder)} --out {out}{flags}"
