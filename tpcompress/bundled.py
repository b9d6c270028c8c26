"""Locate the files that ship with the package: the tiny base model and the recipes."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
MOVED = {f"llava15_7b/{name}.yaml": f"gpus/{name}.yaml" for name in ("ddp", "fsdp2", "zero2", "zero3")}
"""Earlier places of bundled recipes, each with its place today."""


def base_path(name: str) -> str:
    """The folder of a bundled base model (`tiny_llava`); any other name (path or hub id) is returned unchanged."""
    folder = PACKAGE / "assets" / name
    return str(folder) if "/" not in name and (folder / "config.json").is_file() else name


def recipes_folder() -> Path:
    """The folder of recipes: next to the package in a checkout, inside it when installed."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def find_config(path: str) -> str:
    """The path of a configuration file, or of the bundled recipe of that name (`recipes/tiny_llava/pool_full.yaml`).

    Raises:
        FileNotFoundError: neither exists.
    """
    if Path(path).is_file():
        return path
    relative = Path(*[part for part in Path(path).parts if part != "recipes"])
    bundled = recipes_folder() / MOVED.get(relative.as_posix(), relative)
    if bundled.is_file():
        return str(bundled)
    known = sorted(str(p.relative_to(recipes_folder())) for p in recipes_folder().rglob("*.yaml"))
    raise FileNotFoundError(f"No configuration file at {path}; bundled recipes: {', '.join(known)}.")
