"""What a checkpoint holds beside Lightning's own: the trained weights, and the settings that rebuild their model."""

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
"""Entry of a checkpoint: `step` done, `steps` of the run, `settings` of the model."""


def trained_state(module: nn.Module, trained: list[nn.Parameter], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that trains, and the pruners' buffers; everything else is the base's."""
    ours = {id(parameter) for parameter in trained}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in ours}
    names |= {name for name, _ in module.named_buffers() if "token_pruners." in name}
    return {name: value for name, value in state.items() if name in names}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this package.

    Args:
        path: a .ckpt file, a folder written by DeepSpeed, or the folder of a run (its last checkpoint).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not of this package.
    """
    found = checkpoint_file(path)
    try:
        saved = _from_deepspeed(found) if found.is_dir() else _from_file(found)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, BadZipFile) as error:
        raise ValueError(f"{found} is damaged ({type(error).__name__}); take an earlier checkpoint.") from error
    if not isinstance(saved, dict) or KEY not in saved:
        raise ValueError(f"{found} is not a tpcompress checkpoint; it must come from `tpcompress fit`.")
    return saved


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the last one of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    given = Path(path)
    found = given / "checkpoints" / "last.ckpt" if given.is_dir() and not _is_deepspeed(given) else given
    recover(found)
    if not found.exists():
        raise FileNotFoundError(f"No checkpoint at {found}; give a .ckpt file or the folder of a run.")
    return found


def check_weights(module: nn.Module, trained: list[nn.Parameter], state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose weights are not those that train here.

    Raises:
        ValueError: a weight is missing, superfluous, or of another shape.
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
    """Refuse to go on with a run under other settings.

    Raises:
        ValueError: base, plan, parts that train or LoRA have changed.
    """
    changed = [name for name in ("base", "plan", "train", "lora") if now[name] != then.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"The checkpoint was trained with {name} {then.get(name)}, the recipe says {now[name]}; go on with the "
            f"recipe.yaml beside it, or train anew without --ckpt_path."
        )


def _is_deepspeed(path: Path) -> bool:
    """DeepSpeed writes a folder per checkpoint, with its shards in a folder of the tag that Lightning gives it."""
    return (path / "checkpoint").is_dir()


def _from_file(path: Path) -> Any:
    with ZipFile(path) as archive:
        if archive.testzip() is not None:  # torch would load flipped bits as weights
            raise BadZipFile(f"{path} does not have its checksums.")
    return torch.load(path, map_location="cpu", weights_only=True)


def _from_deepspeed(path: Path) -> dict[str, Any]:
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    with tempfile.TemporaryDirectory() as folder:
        return convert_zero_checkpoint_to_fp32_state_dict(path, str(Path(folder) / "whole.ckpt"))
