"""`load`: an exported folder, local or on the hub, as a transformers model with its plan on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from tpcompress.export.folder import MANIFEST, damaged_files, exported_type, first_line, read_manifest, unusable_files
from tpcompress.export.registry import PREFIX, register_model
from tpcompress.export.verify import check


def load(
    folder: str | Path, *, verify: bool = False, allow_outside: bool = False, **from_pretrained: Any
) -> PreTrainedModel:
    """Load an export.

    Args:
        folder: local folder or hub id.
        verify: replay the stored probe on the loaded model before it is returned (local folders only).
        allow_outside: import pruners that are not part of tpcompress; they are code, so only if you trust the folder.
        **from_pretrained: as in transformers: dtype, device_map, attn_implementation, revision ...

    Returns:
        The model in eval mode: a subclass of the stock class, with the plan attached.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, damaged, a pruner from outside, or (with `verify`) other behaviour than in training.
    """
    local = Path(folder).is_dir()
    if local:
        _check_local(Path(folder))
    elif verify or Path(folder).is_absolute() or str(folder).count("/") != 1 or str(folder).startswith("."):
        raise FileNotFoundError(f"No folder {folder}; give one that tpcompress.export wrote.")
    hub = {k: from_pretrained[k] for k in ("revision", "token", "cache_dir", "subfolder") if k in from_pretrained}
    try:
        config = AutoConfig.from_pretrained(folder, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from error
    if not config.model_type.startswith(PREFIX):
        raise ValueError(
            f"{folder} holds a '{config.model_type}' model, not an export of tpcompress; load it with transformers "
            f"and put a plan on it with tpcompress.attach."
        )
    model = register_model(config.base_model_type).from_pretrained(
        folder, allow_outside=allow_outside, **from_pretrained
    )
    if verify:
        report = check(model, Path(folder))
        if not report.ok:
            raise ValueError(str(report))
    return model


def load_processor(folder: str | Path) -> Any:
    """The processor of an export.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    from transformers import AutoProcessor  # brings tokenizers and image processing, which import tpcompress spares

    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"No processor in {folder} ({first_line(error)}); copy or export the folder again.") from error


def _check_local(folder: Path) -> None:
    """Sizes are checked at every load, hashes by `verify` only. A re-saved model has no manifest and is fine."""
    exported_type(folder)
    if (folder / MANIFEST).is_file():
        damaged = unusable_files(damaged_files(folder, read_manifest(folder), hashes=False), folder)
        if damaged:
            name, what = next(iter(damaged.items()))
            raise ValueError(f"{folder / name} {what}; copy or export the folder again.")
