"""Locate the files that ship with the package, the tiny base model and recipes, and what its scripts build."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
MOVED = {f"llava15_7b/{name}.yaml": f"gpus/{name}.yaml" for name in ("ddp", "fsdp2", "zero2", "zero3")}
"""Earlier places of bundled recipes, each with its place today."""


PHOTOS_VARIABLE = "TPCOMPRESS_PHOTOS"
"""Environment variable that names the folder that `scripts/build_photos.py` fills."""

BUILD_PHOTOS = "python scripts/build_photos.py in a checkout of tpcompress"


def photos_folder(folder: str | Path | None = None) -> Path:
    """The folder of the photo benchmark: the argument, else $TPCOMPRESS_PHOTOS, else `~/.cache/tpcompress/photos`."""
    return Path(folder or os.environ.get(PHOTOS_VARIABLE) or "~/.cache/tpcompress/photos").expanduser()


def base_path(name: str) -> str:
    """The folder of a base model that ships (`tiny_llava`) or is built here (`photo_llava`); other names unchanged.

    Raises:
        FileNotFoundError: `photo_llava` was not built; with the command to build it.
    """
    if name == "photo_llava" and not Path(name).is_dir():
        built = photos_folder() / name
        if not (built / "config.json").is_file():
            raise FileNotFoundError(
                f"photo_llava is not at {built}: its photographs and its tower do not ship; build it with "
                f"{BUILD_PHOTOS}, or set ${PHOTOS_VARIABLE} to a folder that has it."
            )
        return str(built)
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
