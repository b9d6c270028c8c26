"""`load`: loads an exported folder, local or from the hub, as a transformers model with its plan attached."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from tpcompress.errors import first_line
from tpcompress.export.budgets import own_budgets, ranges_of, was_trained, with_budgets, words
from tpcompress.export.contents import MANIFEST, check_contents, read_manifest
from tpcompress.export.folder import exported_type
from tpcompress.export.model import stored_plan
from tpcompress.export.registry import PREFIX, register_model
from tpcompress.export.replay import check
from tpcompress.insertion.attach import budgets
from tpcompress.insertion.budget import Budget, read_budgets

logger = logging.getLogger(__name__)


def load(
    folder: str | Path,
    *,
    keep_tokens: int | Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] | None = None,
    verify: bool = False,
    allow_outside: bool = False,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load an export.

    Args:
        folder: local folder or hub id.
        keep_tokens: another budget than the exported one: one count, or one per stage; it becomes the plan's budget.
        keep_ratio: the same as ratios.
        verify: replay the stored probe on the loaded model first (local folders only).
        allow_outside: import pruners that are not part of tpcompress, which runs their code; for trusted folders only.
        **from_pretrained: arguments of transformers' `from_pretrained`: dtype, device_map, attn_implementation, ...

    Returns:
        The model in eval mode: a subclass of the stock class, with the plan attached.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, damaged, a pruner from outside, an impossible budget, or (with `verify`) behaviour
            that differs from the trained model.
    """
    asked = read_budgets(None, keep_tokens, keep_ratio)
    folder = Path(folder).expanduser() if str(folder).startswith("~") else folder
    local = Path(folder).is_dir()
    if local:
        check_contents(Path(folder), exported_type(Path(folder)))
    elif verify or Path(folder).is_absolute() or str(folder).count("/") != 1 or str(folder).startswith("."):
        raise FileNotFoundError(f"No folder {folder}; give one that tpcompress.export wrote.")
    hub = {k: from_pretrained[k] for k in ("revision", "token", "cache_dir", "subfolder") if k in from_pretrained}
    try:
        config = AutoConfig.from_pretrained(folder, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}.") from error
    if not config.model_type.startswith(PREFIX):
        raise ValueError(
            f"{folder} holds a '{config.model_type}' model, not an export of tpcompress; load it with transformers "
            f"and attach a plan with tpcompress.attach."
        )
    if asked is not None and config.token_pruning:
        own = stored_plan(config, allow_outside)
        config.token_pruning = with_budgets(own, asked).to_dict()
        from_pretrained["config"] = config
        if local and (Path(folder) / MANIFEST).is_file():
            _warn_untrained(read_manifest(folder), asked)
    model = register_model(config.base_model_type).from_pretrained(
        folder, allow_outside=allow_outside, **from_pretrained
    )
    if verify:
        with nullcontext() if asked is None else budgets(model, own_budgets(own)):
            report = check(model, Path(folder))
        if not report.ok:
            raise ValueError(str(report))
    return model


def load_processor(folder: str | Path) -> Any:
    """Load the processor of an export.

    Raises:
        ValueError: none in the folder, it is damaged, or the folder holds files that `load` refuses.
    """
    from transformers import AutoProcessor  # loads tokenizers and image processing, too slow for `import tpcompress`

    if (Path(folder) / MANIFEST).is_file():
        check_contents(Path(folder))
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"No processor in {folder} ({first_line(error)}); copy or export the folder again.") from error


def _warn_untrained(manifest: dict[str, Any], asked: Sequence[Budget]) -> None:
    """Warn if the model was trained, and not at such a budget."""
    ranges = ranges_of(manifest)
    if ranges is None or was_trained(asked, ranges, manifest["vision_tokens"]):
        return
    spans = ", then ".join(f"{low} to {high}" if low != high else str(low) for low, high in ranges)
    logger.warning("Loaded with %s, but trained at %s.", words(asked), spans)
