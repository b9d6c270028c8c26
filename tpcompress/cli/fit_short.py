"""`tpcompress fit MODEL DATA`: writes the recipe of a run and runs it; options of recipes can follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from tpcompress.cli.options import underscored


def fit_model(
    model: str,
    data: str,
    plan: str = "divprune:1/9",
    lora: int = 64,
    out: str | None = None,
    steps: int | None = None,
    image_folder: str | None = None,
    batch_size: int | None = None,
    val: str | None = None,
    val_fraction: float = 0.0,
) -> list[str]:
    """Write the recipe of a run.

    Args:
        model: base model: folder, hub id or bundled name.
        data: training data.
        plan: PRUNER:KEEP@LAYER,..., plan file or recipe; none trains the dense model.
        lora: rank of LoRA; 0 trains all weights.
        out: folder of the run, in which the recipe is written; default: runs/MODEL-PLAN.
        steps: optimizer steps; default: one epoch, at least 100.
        image_folder: folder that relative image paths start from.
        batch_size: rows per batch.
        val: validation data.
        val_fraction: share of the data for validation, without `val`.

    Returns:
        Arguments of `fit` that run the recipe.
    """
    from tpcompress.compress.recipe import RunChoices, family_of_base, make_recipe, write_recipe
    from tpcompress.evaluation.engine.cell import slug
    from tpcompress.training.datamodules.chat import read_ahead

    wanted = None if plan in ("none", "null") else plan
    out = out or f"runs/{slug(f'{Path(model).name}-{wanted}'.lower() if wanted else f'{Path(model).name}-dense')}"
    choices = RunChoices(model, data, wanted, out, lora, steps, image_folder, batch_size, val, val_fraction)
    family_of_base(model)  # a wrong model is reported before the data are read
    path = Path(out) / "fit.yaml"
    write_recipe(make_recipe(choices, read_ahead(data, image_folder)), path, f"tpcompress fit --config {path}")
    return ["--config", str(path)]


def is_short(args: list[str]) -> bool:
    """Whether `fit` is called with a model and data instead of a recipe."""
    return bool(args) and not args[0].startswith("-")


def split_options(command: Callable[..., object], args: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of the short form, and those of the recipe, which are handed on."""
    known = set(inspect.signature(command).parameters)
    own, others, rest = [], [], list(args)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = underscored(argument).partition("=")
        if not argument.startswith("--") or name[2:] in known:
            own.append(argument)
            if argument.startswith("--") and not equals and rest:
                own.append(rest.pop(0))
            continue
        others.append(underscored(argument))
        if not equals and rest and not rest[0].startswith("--"):
            others.append(rest.pop(0))
    return own, others
