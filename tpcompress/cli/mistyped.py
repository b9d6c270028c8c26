"""Looks at the paths of a command line before frameworks are imported: a mistyped one is answered at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tpcompress.cli.options import underscored
from tpcompress.paths import check_data, check_export, check_image_folder, check_model
from tpcompress.recipe_files import merge_recipes, read_recipe

CHECKS: dict[str, Callable[[str], object]] = {
    "model": check_model, "base": check_model, "data": check_data, "val": check_data,
    "image_folder": check_image_folder, "folder": check_export,
}  # fmt: skip
"""What is checked of an option of a command, by its name."""

RECIPE_CHECKS: dict[str, Callable[[str], object]] = {
    "model.base": check_model,
    "data.train": check_data,
    "data.val": check_data,
    "data.image_folder": check_image_folder,
}
"""The same of the settings of a recipe; `init_args` of the data are left out of the names."""


def check_options(given: Sequence[str]) -> None:
    """Check the paths among the options of a command.

    Args:
        given: options as `--name=value`.

    Raises:
        FileNotFoundError: one of them does not exist.
    """
    for argument in given:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in CHECKS and value and value not in ("null", "none", "benchmark"):
            CHECKS[name](value)


def check_recipe(args: Sequence[str]) -> None:
    """Check the paths of recipes and of the settings given beside them; not of a recipe that is only printed.

    Args:
        args: arguments of `fit` or `validate`.

    Raises:
        FileNotFoundError: a recipe, or a path in it, does not exist.
    """
    if any(argument.startswith("--print") for argument in map(underscored, args)):
        return
    values: dict[str, Any] = {}
    settings: dict[str, str] = {}
    for name, value in _pairs(args):
        if name == "config":
            read = read_recipe(value)
            values = merge_recipes(values, read) if isinstance(read, Mapping) else values
        else:
            settings[name.replace("init_args.", "")] = value
    data, model = values.get("data"), values.get("model")
    inner = data.get("init_args", data) if isinstance(data, Mapping) else {}
    found = {f"data.{key}": value for key, value in inner.items()} if isinstance(inner, Mapping) else {}
    found |= {"model.base": model.get("base")} if isinstance(model, Mapping) else {}
    for name, check in RECIPE_CHECKS.items():
        given = settings.get(name, found.get(name))
        if isinstance(given, str) and given not in ("", "null"):
            check(given)


def _pairs(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of the options."""
    for place, argument in enumerate(args):
        name, equals, value = underscored(argument).partition("=")
        if not name.startswith("--"):
            continue
        if equals:
            yield name[2:], value
        elif place + 1 < len(args) and not args[place + 1].startswith("--"):
            yield name[2:], args[place + 1]
