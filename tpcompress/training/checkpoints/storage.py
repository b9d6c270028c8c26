"""Atomic checkpoints: written beside the previous one, flushed to the disk, then renamed.

Lightning writes to the system's folder for temporary files and moves the result. On another file system the move is a
copy, and a process that is killed during the copy, or a full disk, destroys the previous checkpoint. Unlike
`tpcompress.files`, this module also replaces folders (sharded checkpoints) and flushes to the disk.
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
"""Suffix of a file or folder that is being written."""
OLD = ".old"
"""Suffix of a folder that is about to be replaced."""


class CheckpointNotSaved(OSError):
    """A checkpoint could not be written; the previous one is intact."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint as one file, atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file, or leave the previous one unchanged.

        Raises:
            CheckpointNotSaved: no space, no permission, or another disk error.
        """
        path = Path(path)
        part = path.with_name(path.name + PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            replace_atomically(path)
        except Exception as error:
            if not is_disk_error(error):
                raise
            raise CheckpointNotSaved(not_saved_message(path, error)) from error
        finally:
            remove(part)


def replace_atomically(path: Path) -> None:
    """Rename the written file or folder `<path>.part` to `path`, which may exist.

    A file is replaced in one step. A folder cannot be: the previous one is renamed to `<path>.old` for a moment, and
    `recover` renames it back if the process was killed in that moment.
    """
    part, old = path.with_name(path.name + PART), path.with_name(path.name + OLD)
    if part.is_dir():
        for inside in part.rglob("*"):
            _flush(inside)
        _flush(part)
    if path.exists() and (part.is_dir() or path.is_dir()):
        remove(old)
        path.rename(old)
    part.replace(path)
    _flush(path.parent)
    remove(old)


def recover(path: Path) -> None:
    """Restore a folder that `replace_atomically` had renamed, if its replacement is missing."""
    old = path.with_name(path.name + OLD)
    if old.exists() and not path.exists():
        old.rename(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception is a failed write; torch's archive writer raises its own RuntimeError."""
    return isinstance(error, OSError | CheckpointException) or "inline_container" in str(error)


def not_saved_message(path: Path, error: BaseException | None) -> str:
    """One-line error message for a checkpoint that could not be written."""
    reason, cause = str(error).partition("\n")[0], error
    while cause is not None:  # torch and this package wrap the OSError
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    remedy = f"resume with the same command and --ckpt_path {path}" if path.exists() else "run the same command again"
    return (
        f"The checkpoint {path} could not be saved ({reason}). Training stops, because further steps could be lost; "
        f"the previous checkpoint is intact. Free disk space, then {remedy}."
    )


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
