"""Finds and reads checkpoints: a file, a folder of DeepSpeed, or the last one of a run."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from tpcompress.training.checkpoint_content import KEY
from tpcompress.training.checkpoints.storage import recover


def read_checkpoint(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a .ckpt file, a folder written by DeepSpeed, or the folder of a run (its last checkpoint).
        mapped: map the weights of a file into memory, instead of reading them.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a checkpoint that is damaged, or not of tpcompress.
    """
    found = checkpoint_file(path)
    try:
        saved = _from_deepspeed(found) if found.is_dir() else _from_file(found, mapped)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, BadZipFile) as error:
        raise ValueError(f"{found} is damaged ({type(error).__name__}); use an earlier checkpoint.") from error
    if not isinstance(saved, dict) or KEY not in saved:
        raise ValueError(f"{found} is not a tpcompress checkpoint; it must come from `tpcompress fit`.")
    return saved


def checkpoint_file(path: str | Path) -> Path:
    """The path of a checkpoint: the given one, or the last checkpoint of a run's folder.

    Raises:
        FileNotFoundError: no checkpoint.
    """
    given = Path(path).expanduser()
    found = given / "checkpoints" / "last.ckpt" if given.is_dir() and not _is_deepspeed(given) else given
    recover(found)
    if not found.exists():
        raise FileNotFoundError(f"No checkpoint at {found}; give a .ckpt file or the folder of a run.")
    return found


def _is_deepspeed(path: Path) -> bool:
    """Whether a path is a DeepSpeed checkpoint: a folder with its shards in a subfolder named by Lightning's tag."""
    return (path / "checkpoint").is_dir()


def _from_file(path: Path, mapped: bool) -> Any:
    with ZipFile(path) as archive:
        if archive.testzip() is not None:  # torch does not check the checksums itself
            raise BadZipFile(f"{path} has wrong checksums.")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)


def _from_deepspeed(path: Path) -> dict[str, Any]:
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    with tempfile.TemporaryDirectory() as folder:
        return convert_zero_checkpoint_to_fp32_state_dict(path, str(Path(folder) / "full.ckpt"))
