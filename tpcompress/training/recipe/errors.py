"""Turns an error of jsonargparse about a recipe into one line: which key, what was given, what is possible."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import lightning as L

from tpcompress.errors import did_you_mean
from tpcompress.open_set import subclasses
from tpcompress.training.datamodules import benchmark, chat  # noqa: F401  makes their classes known
from tpcompress.training.datamodules.base import RowsData
from tpcompress.training.losses import Loss
from tpcompress.training.module import PruningModule
from tpcompress.training.schedules import Schedule
from tpcompress.training.teachers import Teacher

SECTIONS = ("seed_everything", "trainer", "model", "data", "checkpoints", "ckpt_path")

OPEN_SETS: dict[str, type] = {"schedule": Schedule, "losses": Loss, "teacher": Teacher, "data": RowsData}
"""Base class of the classes that a recipe may name without a path, by a word of the key."""

# jsonargparse has no structured errors; these are the parts of its messages that are used.
KEY = re.compile(r'Parser key "([\w.]+)":?')
UNKNOWN_KEY = re.compile(r"(?:accept option|unrecognized arguments:) '?-{0,2}([\w.]+)")
UNKNOWN_ARGUMENT = re.compile(r"given class_path '([\w.]+)': Option '(\w+)' is not accepted")
UNKNOWN_CLASS = re.compile(r"dot import path string: (\S+)")
GIVEN = re.compile(r"Given value: (.*)", re.DOTALL)
NOISE = re.compile(r"-? *Expected a <class 'NoneType'>|Problem with given class_path '[\w.]+': *|typing\.")
CLASS = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>")


def readable(error: BaseException) -> str:
    """One line for an error of jsonargparse, with the closest known name for a wrong one."""
    text = str(error)
    keys = list(dict.fromkeys(KEY.findall(text)))
    where = f"{'.'.join(keys)}: " if keys else ""
    reason = KEY.sub("", text.partition("Errors:\n")[2].partition("Given value type")[0] or text)
    reason = " ".join(reason.split())
    if "arguments are required: " in reason and reason.endswith(".data"):
        return "A run needs data; give a recipe: --config recipes/tiny_llava/pool_full.yaml."
    if found := UNKNOWN_KEY.search(reason):
        return _unknown_key(found[1])
    if found := UNKNOWN_ARGUMENT.search(reason):
        path, name = found.groups()
        return f"{where}{path.rpartition('.')[2]} has no '{name}'; " + _known(name, _arguments(path))
    if found := UNKNOWN_CLASS.search(reason):
        return f"{where}no class '{found[1]}'; " + _known(found[1], _classes(where), " or a dotted path")
    reason = CLASS.sub(r"\1", NOISE.sub("", reason)).strip("- ")
    given = GIVEN.search(text)
    value = f" Got value: {' '.join(given[1].split())}." if given and keys and "Got value" not in reason else ""
    return f"{where}{reason}{value}"


def _unknown_key(key: str) -> str:
    section, _, rest = key.partition(".")
    if not rest or section not in SECTIONS:
        return f"No key {section}; " + _known(section, SECTIONS)
    name = rest.partition(".")[0]
    owner = {"model": PruningModule, "trainer": L.Trainer}.get(section)
    advice = _known(name, _parameters(owner)) if owner else f"see --help for the keys of {section}."
    return f"No key {section}.{name}; {advice}"


def _known(name: str, known: Iterable[str], also: str = "") -> str:
    known = list(known)
    return f"known: {', '.join(known)}{also}.{did_you_mean(name, known)}"


def _parameters(of: Any) -> list[str]:
    return [name for name in inspect.signature(of).parameters if name not in ("args", "kwargs")]


def _arguments(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return _parameters(getattr(importlib.import_module(module), name))


def _classes(where: str) -> list[str]:
    """Names of the classes of this package that a recipe may give at a key."""
    base = next((cls for word, cls in OPEN_SETS.items() if word in where), RowsData)
    known: set[type] = subclasses(base)
    return sorted(cls.__name__ for cls in known if cls.__module__.startswith("tpcompress.training."))
