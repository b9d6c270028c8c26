"""Finds mistyped files and folders before anything is imported or requested, and names what lies near."""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path

from tpcompress.bundled import base_path
from tpcompress.hub import looks_like_path

DATA_SUFFIXES = (
    ".json", ".jsonl", ".csv", ".tsv", ".tar", ".parquet", ".arrow",
    ".json.gz", ".jsonl.gz", ".csv.gz", ".tsv.gz", ".tar.gz", ".tgz", ".ndjson", ".ndjson.gz",
)  # fmt: skip
"""Endings of data files: names with one of them are no names on the hub."""
MODEL_HINT = "give a folder, a hub id that can be reached, or tiny_llava."
ALIKE = 0.75
"""Least similarity of names, which share their endings more often than words do."""
MOST = 5000
"""Entries of a folder that are looked at for a name that is close."""


def near_path(path: str | Path) -> str:
    """` Did you mean X?` for an existing path whose first wrong part is close to that of a missing one; else empty.

    Args:
        path: a path that does not exist.
    """
    base, rest = Path(path).expanduser(), list[str]()
    while not base.exists() and base != base.parent:
        rest.insert(0, base.name)
        base = base.parent
    try:
        names = [entry.name for entry in islice(base.iterdir(), MOST)] if rest and base.is_dir() else []
    except OSError:  # a folder that cannot be listed
        return ""
    near = difflib.get_close_matches(rest[0], names, n=1, cutoff=ALIKE) if names else []
    if not near:
        return ""
    found = base / near[0]
    whole = found.joinpath(*rest[1:])
    return f" Did you mean {whole if whole.exists() else found}?"


def missing_data(source: str | Path) -> FileNotFoundError:
    """The error for a data file or folder that does not exist."""
    *most, last = DATA_SUFFIXES[:7]
    known = f"{', '.join(most)} and {last}"
    return FileNotFoundError(
        f"No file or folder {source}. Give {known} files, a folder, or a name on the hub.{near_path(source)}"
    )


def check_data(source: str) -> None:
    """Refuse a data source that is meant as a path and is none; addresses, patterns and names on the hub pass.

    Raises:
        FileNotFoundError: with the path that was probably meant.
    """
    if "://" in source or "*" in source or "{" in source or Path(source).expanduser().exists():
        return
    is_path = Path(source).is_absolute() or source.startswith((".", "~"))
    if is_path or source.lower().endswith(DATA_SUFFIXES):
        raise missing_data(source)


def check_image_folder(folder: str | Path) -> Path:
    """The folder of images, with `~` expanded.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        hint = near_path(path)
        raise FileNotFoundError(f"No image folder {folder}; give the folder that image paths are relative to.{hint}")
    return path


def check_checkpoint(given: str) -> None:
    """Refuse a checkpoint or run that does not exist.

    Raises:
        FileNotFoundError: with the path that was probably meant.
    """
    if not Path(given).expanduser().exists():
        raise FileNotFoundError(
            f"No checkpoint at {given}; give a .ckpt file or the folder of a run.{near_path(given)}"
        )


def check_model(base: str) -> None:
    """Refuse a model, export or checkpoint that is meant as a path and is none; names on the hub pass.

    Raises:
        FileNotFoundError: with the path that was probably meant.
    """
    path = str(Path(base_path(base)).expanduser()) if base.startswith("~") else base_path(base)
    if path.endswith(".ckpt"):
        return check_checkpoint(path)
    if not Path(path).exists() and looks_like_path(path):
        raise FileNotFoundError(f"No folder {path}; {MODEL_HINT}{near_path(path)}")
    return None


def check_export(folder: str) -> None:
    """Refuse an exported folder that does not exist.

    Raises:
        FileNotFoundError: with the path that was probably meant.
    """
    if not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"No folder {folder}; give one that tpcompress.export wrote.{near_path(folder)}")
