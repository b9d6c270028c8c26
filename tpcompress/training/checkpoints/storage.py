"""Checkpoints that are whole or not there: written beside, forced to the disk, then renamed.

Lightning writes to the system's folder for temporary files and moves the result. Where that is another file system the
move is a copy: a process killed within it, or a disk that fills up, has destroyed the checkpoint before.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

PART = ".part"
"""Suffix of what is being written."""
OLD = ".old"
"""Suffix of a folder that its successor is about to replace."""


class CheckpointNotSaved(OSError):
    """A checkpoint could not be written; the one before is whole."""


class DurableFile(TorchCheckpointIO):
    """Writes a checkpoint as one file, in place of Lightning's way."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file, or leave everything as it was.

        Raises:
            CheckpointNotSaved: no space, no permission, or another fault of the disk.
        """
        path = Path(path)
        part = path.with_name(path.name + PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(path)
        except Exception as error:
            if not is_fault_of_disk(error):
                raise
            raise CheckpointNotSaved(not_saved(path, error)) from error
        finally:
            remove(part)


def put_in_place(path: Path) -> None:
    """Rename `<path>.part` to `path`, in whose place there may be an earlier one; file or folder, written already.

    A file is replaced in one step. A folder cannot be: the one before stands aside as `<path>.old` for a moment, and
    `recover` puts it back if the process was killed in that moment.
    """
    part, old = path.with_name(path.name + PART), path.with_name(path.name + OLD)
    if part.is_dir():
        for inside in part.rglob("*"):
            _sync(inside)
        _sync(part)
    if path.exists() and (part.is_dir() or path.is_dir()):
        remove(old)
        path.rename(old)
    part.replace(path)
    _sync(path.parent)
    remove(old)


def recover(path: Path) -> None:
    """Put back what `put_in_place` had set aside, if its successor never came."""
    old = path.with_name(path.name + OLD)
    if old.exists() and not path.exists():
        old.rename(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_fault_of_disk(error: BaseException) -> bool:
    """Whether a write failed; torch's writer of archives may raise an error of its own."""
    return isinstance(error, OSError | CheckpointException) or "inline_container" in str(error)


def not_saved(path: Path, error: BaseException | None) -> str:
    """The one line that tells the user."""
    reason, cause = str(error).partition("\n")[0], error
    while cause is not None:  # torch and this package wrap what the disk said
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    remedy = f"go on with the same command and --ckpt_path {path}" if path.exists() else "run the same command again"
    return (
        f"The checkpoint {path} could not be saved ({reason}). Training stops, because what it does from here on could "
        f"be lost; no earlier checkpoint is. Make room, then {remedy}."
    )


def _sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
