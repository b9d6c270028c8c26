"""Content of a checkpoint: the trained weights, and the settings from which their model is rebuilt."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from tpcompress.training.checkpoints.storage import recover

KEY = "tpcompress"
"""Entry of a checkpoint with `step` done, `steps` of the run, and `settings` of the model."""


def trained_state(module: nn.Module, trained: list[nn.Parameter], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights of a state dict, and the buffers of the pruners; everything else comes from the base."""
    ours = {id(parameter) for parameter in trained}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in ours}
    names |= {name for name, _ in module.named_buffers() if "token_pruners." in name}
    return {name: value for name, value in state.items() if name in names}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a .ckpt file, a folder written by DeepSpeed, or the folder of a run (its last checkpoint).

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a checkpoint that is damaged, or not of tpcompress.
    """
    found = checkpoint_file(path)
    try:
        saved = _from_deepspeed(found) if found.is_dir() else _from_file(found)
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
    given = Path(path)
    found = given / "checkpoints" / "last.ckpt" if given.is_dir() and not _is_deepspeed(given) else given
    recover(found)
    if not found.exists():
        raise FileNotFoundError(f"No checkpoint at {found}; give a .ckpt file or the folder of a run.")
    return found


def check_weights(module: nn.Module, trained: list[nn.Parameter], state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that lacks weights which train in this run.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    ours = {id(parameter) for parameter in trained}
    wanted = {name: p.shape for name, p in module.named_parameters() if id(p) in ours}
    missing = [name for name in wanted if name not in state or state[name].shape != wanted[name]]
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} of the {len(wanted)} weights that train here, {missing[0]} first; "
            f"it is of another recipe."
        )


def check_settings(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuse to resume a run under other settings.

    Raises:
        ValueError: base, plan, trained parts or LoRA have changed.
    """
    changed = [name for name in ("base", "plan", "train", "lora") if now[name] != then.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"The checkpoint was trained with {name} {then.get(name)}, the recipe has {now[name]}; resume with the "
            f"recipe.yaml beside it, or start again without --ckpt_path."
        )


def _is_deepspeed(path: Path) -> bool:
    """Whether a path is a DeepSpeed checkpoint: a folder with its shards in a subfolder named by Lightning's tag."""
    return (path / "checkpoint").is_dir()


def _from_file(path: Path) -> Any:
    with ZipFile(path) as archive:
        if archive.testzip() is not None:  # torch does not check the checksums itself
            raise BadZipFile(f"{path} has wrong checksums.")
    return torch.load(path, map_location="cpu", weights_only=True)


def _from_deepspeed(path: Path) -> dict[str, Any]:
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    with tempfile.TemporaryDirectory() as folder:
        return convert_zero_checkpoint_to_fp32_state_dict(path, str(Path(folder) / "full.ckpt"))
