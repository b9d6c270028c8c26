"""A recipe's teacher asked beforehand: the unpruned base answers the recipe's training data once, onto disk."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from tpcompress.bundled import find_config
from tpcompress.training.recipe.run import RecipeCLI
from tpcompress.training.teachers.cache import cache_teacher


def cache_of_recipe(config: str, out: str | Path, top: int, console: Console) -> int:
    """Write the answers of a recipe's base to its training data; a folder that holds a part is completed.

    Args:
        config: the recipe; its base, dtype, attention and data count.
        out: folder of the cache.
        top: most likely tokens kept per answer position.
        console: where progress goes.

    Returns:
        Sequences written by this call.

    Raises:
        ValueError: the folder holds something else, the data is a stream, or `top` is not below the vocabulary.
    """
    run = RecipeCLI(["--config", find_config(config)], progress=False, run=False)
    if getattr(run.datamodule, "streaming", False):
        raise ValueError("A stream has no end, so its answers cannot be kept; set data streaming: false.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = run.model
    return cache_teacher(
        module.base, run.datamodule, str(out), top, dtype=module.dtype_name, attention=module.attention, device=device,
        shown=lambda batches: track(batches, "asking the base", console=console),
    )  # fmt: skip
