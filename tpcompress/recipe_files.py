"""Read recipe files: settings that several recipes share are in a file that each of them includes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcompress.bundled import find_config
from tpcompress.errors import read_yaml

INCLUDE = "include"
"""Key of a recipe that names one file, or a list of files, whose settings its own are laid over."""

WHOLE = ("plan", "lora", "losses", "schedule", "teacher")
"""Settings that replace those of an included file and are not merged with them."""


def read_recipe(path: str | Path) -> Any:
    """The values of a recipe, laid over those of the files that it includes.

    Included files are looked up relative to the recipe, then as bundled recipes.

    Raises:
        FileNotFoundError: the recipe or an included file does not exist.
        ValueError: a file that is not YAML, or that includes itself.
    """
    return _read(Path(find_config(str(path))), ())


def merge_recipes(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`: mappings are merged, except whole settings and classes of another name."""
    merged = dict(base)
    for key, value in over.items():
        old: Any = merged.get(key)
        mergeable = isinstance(value, Mapping) and isinstance(old, Mapping) and key not in WHOLE
        if mergeable and value.get("class_path", old.get("class_path")) == old.get("class_path"):
            merged[key] = merge_recipes(old, value)
        else:
            merged[key] = value
    return merged


def _read(path: Path, outer: tuple[Path, ...]) -> Any:
    values = read_yaml(path)
    if not isinstance(values, dict) or INCLUDE not in values:
        return values
    names = values.pop(INCLUDE) or []
    base: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        found = path.parent / name
        found = found if found.is_file() else Path(find_config(name))
        if found.resolve() in (*outer, path.resolve()):
            raise ValueError(f"{path} includes itself by {name}; remove that entry of `{INCLUDE}`.")
        included = _read(found, (*outer, path.resolve()))
        if not isinstance(included, Mapping):
            raise ValueError(f"{found}, which {path} includes, is not a mapping of settings.")
        base = merge_recipes(base, included)
    return merge_recipes(base, values)
