"""`tpcompress cache-teacher`: stores the unpruned base's answers to the training data of a recipe."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from tpcompress.bundled import find_config
from tpcompress.training.recipe.run import RecipeCLI
from tpcompress.training.teachers.cache import cache_teacher


def cache_of_recipe(config: str, out: str | Path, top: int, console: Console) -> int:
    """Write the answers of a recipe's base to its training data; an incomplete folder is completed.

    Args:
        config: recipe, which sets base, dtype, attention implementation and data.
        out: folder of the cache.
        top: most likely tokens kept per answer position.
        console: console for progress.

    Returns:
        Number of sequences written by this call.

    Raises:
        ValueError: the folder holds something else, the data is a stream, or `top` is not below the vocabulary size.
    """
    run = RecipeCLI(["--config", find_config(config)], progress=False, run=False)
    if getattr(run.datamodule, "streaming", False):
        raise ValueError("A stream has no end, so its answers cannot be stored; set data streaming: false.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = run.model
    return cache_teacher(
        module.base, run.datamodule, str(out), top, dtype=module.dtype_name, attention=module.attention, device=device,
        shown=lambda batches: track(batches, "running the base", console=console),
    )  # fmt: skip
