"""Hashes of everything that decides a result: base model, source code of a pruner, files that a recipe names."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils import cached_file

from tpcompress.bundled import base_path
from tpcompress.errors import first_line
from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners.config_mixin import ConfigMixin
from tpcompress.version import __version__

SMALL = 1 << 30
"""Bytes of weights up to which their content is hashed; of larger ones, names, sizes and safetensors headers."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def digest_of(value: Any) -> str:
    """Hash of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def base_digest(base: str) -> str:
    """Hash of a base model: the content of its configuration, tokenizer and weights.

    Weights above 1 GiB in total count by file name, size and header (names, types and shapes of the tensors).

    Args:
        base: folder, hub id or bundled name.

    Raises:
        ValueError: there is no such model.
    """
    path = base_path(base)
    if not Path(path).is_dir():
        try:
            config = cached_file(path, "config.json")
        except (OSError, ValueError) as error:
            raise ValueError(f"No model at '{base}': {first_line(error)}; give a folder or a hub id.") from error
        path = str(Path(str(config)).parent)
    files = sorted(p for p in Path(path).iterdir() if p.is_file() and not p.name.startswith("."))
    weights = [p for p in files if p.suffix in WEIGHTS]
    whole = sum(p.stat().st_size for p in weights) <= SMALL
    return digest_of({p.name: file_digest(p) if whole or p not in weights else _header_digest(p) for p in files})


def code_digest(plan: PruningPlan | None) -> str:
    """Hash of the package version and of the source files of a plan's pruners, their parts and their helpers."""
    modules: dict[str, ModuleType] = {}
    for part in _parts(plan):
        for cls in type(part).__mro__:
            if not cls.__module__.startswith(("torch.", "builtins")):
                _collect(cls.__module__, cls.__module__.partition(".")[0], modules)
    files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
    return digest_of([__version__, {name: _source_digest(file) for name, file in files.items() if file}])


def files_of(values: Any) -> dict[str, str]:
    """Hashes of the files and folders that a recipe names: files by content, folders by names and sizes of their files.

    Files inside folders of a folder are not looked at, so image folders of any size cost little.
    """
    found = {}
    for text in _texts(values):
        path = Path(text)
        if len(text) < 1024 and ("/" in text or "." in text):
            if path.is_file():
                found[text] = file_digest(path)
            elif path.is_dir() and text not in (".", ".."):
                found[text] = digest_of(sorted((p.name, p.stat().st_size) for p in path.iterdir() if p.is_file()))
    return found


def _parts(plan: PruningPlan | None) -> Iterator[ConfigMixin]:
    """The pruners of a plan, and the pruners and parts inside them."""
    waiting: list[Any] = [stage.pruner for stage in plan.stages] if plan is not None else []
    while waiting:
        part = waiting.pop()
        yield part
        values = [getattr(part, name, None) for name in part.argument_names()]
        nested = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
        waiting += [value for value in [*nested, *part.children()] if isinstance(value, ConfigMixin)]


def _collect(name: str, package: str, found: dict[str, ModuleType]) -> None:
    """A module, and all modules of its package's pruner code that it takes names from."""
    module = sys.modules.get(name)
    inside = name.startswith("tpcompress.pruners") if package == "tpcompress" else name.partition(".")[0] == package
    if module is None or name in found or not inside:
        return
    found[name] = module
    for value in list(vars(module).values()):
        other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(other, str):
            _collect(other, package, found)


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, Iterable):
        for value in values:
            yield from _texts(value)


@cache
def _source_digest(path: str) -> str:
    return file_digest(Path(path))


def file_digest(path: Path) -> str:
    """Hash of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_digest(path: Path) -> list[Any]:
    """Size of a file of weights, and the hash of its header if it is a safetensors file."""
    size = path.stat().st_size
    if path.suffix != ".safetensors" or size < 8:
        return [size]
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return [size, hashlib.sha256(file.read(min(length, size))).hexdigest()]
