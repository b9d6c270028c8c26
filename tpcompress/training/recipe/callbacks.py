"""Callbacks of a run: those of this package, unless the recipe replaces or disables them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback, ProgressBar, StochasticWeightAveraging

from tpcompress.training.checkpoints.callback import Checkpoints, StepProgress


def callbacks_of_run(trainer: dict[str, Any], own: Sequence[Callback], progress: bool) -> list[Callback]:
    """All callbacks of a run.

    Args:
        trainer: arguments of the trainer, with the recipe's `callbacks` as objects. Its `enable_progress_bar` is set
            to False if it is not given and nothing shows progress.
        own: callbacks of this package that the recipe configures.
        progress: show the progress of this package.

    Raises:
        ValueError: a callback that cannot work here.
    """
    given = trainer.get("callbacks") or []
    found: list[Callback] = [*(given if isinstance(given, list) else [given])]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in found):
        raise ValueError(
            "StochasticWeightAveraging copies the model before it is loaded, so it would average nothing; use "
            "lightning.pytorch.callbacks.EMAWeightAveraging."
        )
    saves = trainer.get("enable_checkpointing") is not False
    found += [callback for callback in own if saves or not isinstance(callback, Checkpoints)]
    shown = any(isinstance(callback, ProgressBar) for callback in found)
    if not shown and trainer.get("enable_progress_bar") is not False:
        if progress:
            found.append(StepProgress())
        elif trainer.get("enable_progress_bar") is None:
            trainer["enable_progress_bar"] = False
    return found
