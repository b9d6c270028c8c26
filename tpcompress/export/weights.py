"""Weight files of an export: `tpcompress.safetensors`, a name that no argument of a stock class reaches.

transformers writes `model.VARIANT.safetensors`; its files are renamed after writing, shards and index alike. Folders of
earlier versions hold `model.tpcompress.safetensors`, which is still read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

VARIANT = "tpcompress"
"""Variant under which transformers writes, and under which earlier versions left their files."""
STEM, WRITTEN = "tpcompress", f"model.{VARIANT}"
"""Start of the names of weight files, and the start under which transformers writes them."""
WEIGHTS, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
WRITTEN_INDEX = f"model.safetensors.index.{VARIANT}.json"
MAX_SHARD_SIZE = "5GB"
"""Largest weight file; larger models are written as several. One tensor alone may be larger."""
HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
"""Arguments of `from_pretrained` that say where files are."""

_file: ContextVar[str | None] = ContextVar("tpcompress_weights", default=None)


def find_weights(folder: str | os.PathLike[str], options: Mapping[str, Any]) -> str | None:
    """Name of the weight file or of the index of shards; None in a folder of an earlier version.

    Args:
        folder: local folder or hub id.
        options: arguments of `from_pretrained`, of which `HUB` are read.
    """
    return next((name for name in (WEIGHTS, INDEX) if has_file(folder, name, options)), None)


def has_file(folder: str | os.PathLike[str], name: str, options: Mapping[str, Any]) -> bool:
    """Whether a local folder or hub repository has a file.

    Args:
        folder: local folder or hub id.
        name: of the file.
        options: arguments of `from_pretrained`, of which `HUB` are read.
    """
    given = {name: options[name] for name in HUB if options.get(name) is not None}
    if Path(folder).is_dir():
        return (Path(folder) / given.get("subfolder", "") / name).is_file()
    return cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **given) is not None


@contextmanager
def reading(name: str | None) -> Iterator[None]:
    """Run a block in which new exported configs name this weight file."""
    token = _file.set(name)
    try:
        yield
    finally:
        _file.reset(token)


def weights_to_read() -> str | None:
    """The weight file of the `reading` block under way."""
    return _file.get()


def rename_written(folder: Path) -> None:
    """Rename the weight files that transformers wrote, and remove those of an earlier save."""
    written = sorted(folder.glob(f"{WRITTEN}*.safetensors"))
    if not written:
        return
    for old in (*folder.glob(f"{STEM}.safetensors*"), *folder.glob(f"{STEM}-*-of-*.safetensors")):
        old.unlink()
    for path in written:
        path.rename(folder / _renamed(path.name))
    index = folder / WRITTEN_INDEX
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"] = {weight: _renamed(file) for weight, file in values["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        index.unlink()


def _renamed(name: str) -> str:
    return STEM + name.removeprefix(WRITTEN)
