"""Renamed recipe keys and classes: an error with the new names for inputs, translation for recipes of older runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tpcompress.recipe_files import read_recipe

KEYS = {"model.scorer": "model.pruner_phase"}
"""Old recipe keys, each with its new one at the same depth."""

CLASSES = {
    "Copy": "FrozenCopy",
    "Milder": "LargerBudget",
    "Several": "Matryoshka",
    "tpcompress.training.datamodule.BenchmarkData": "BenchmarkData",
    "tpcompress.training.datamodule.ChatData": "ChatData",
    "tpcompress.training.sharding.FSDP2": "tpcompress.training.distributed.fsdp2.FSDP2",
}
"""Old class names and dotted paths, each with what a recipe writes now."""

CLASS_KEYS = frozenset({"class_path", "data", "losses", "teacher", "schedule", "budget", "strategy"})
"""Keys whose value may be the name of a class."""


def rename(recipe: Any) -> tuple[Any, dict[str, str]]:
    """A recipe with the new names, and the old names that it contained, each with its new one."""
    found: dict[str, str] = {}
    return _renamed(recipe, "", found), found


def check_names(args: Sequence[str]) -> None:
    """Refuse command-line arguments and `--config` files with old names.

    Args:
        args: arguments of `tpcompress fit` or `validate`.

    Raises:
        ValueError: an old name; the message lists all of them with their new ones.
    """
    for flag, value in _flags(args):
        if flag in ("config", "c"):
            values, where = (read_recipe(value) if Path(value).is_file() else None), f"in {value}"
        else:
            values, where = _nested(flag, value), "on the command line"
        _, found = rename(values)
        if found:
            pairs = ", ".join(f"{old} is now {new}" for old, new in found.items())
            raise ValueError(f"Renamed: {pairs}; write the new name {where}.")


def _renamed(value: Any, key: str, found: dict[str, str]) -> Any:
    if isinstance(value, dict):
        renamed = {}
        for name, inner in value.items():
            old = f"{key}.{name}" if key else str(name)
            new = KEYS.get(old, old)
            if new != old:
                found[old] = new
            renamed[name if new == old else new.rpartition(".")[2]] = _renamed(inner, new, found)
        return renamed
    if isinstance(value, list):
        return [_renamed(each, key, found) for each in value]
    if isinstance(value, str) and key.rpartition(".")[2] in CLASS_KEYS:
        renamed_class = _new_class(value)
        if renamed_class is not None:
            found[value] = renamed_class
            return renamed_class
    return value


def _new_class(path: str) -> str | None:
    """The new name of a class of this package; None for all others, such as a user's own `mine.Copy`."""
    module, _, name = path.rpartition(".")
    if path in CLASSES:
        return CLASSES[path]
    return CLASSES.get(name) if module.startswith("tpcompress.training.") else None


def _flags(args: Sequence[str]) -> list[tuple[str, str]]:
    """Name and value of each `--name value` and `--name=value`."""
    found = []
    for number, arg in enumerate(args):
        if arg.startswith("-"):
            name, equals, value = arg.lstrip("-").partition("=")
            following = args[number + 1] if number + 1 < len(args) else ""
            found.append((name.rstrip("+"), value if equals else following))
    return found


def _nested(flag: str, text: str) -> Any:
    """`model.teacher.class_path`, `X` as `{model: {teacher: {class_path: X}}}`."""
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        values = text
    for name in reversed(flag.split(".")):
        values = {name: values}
    return values
