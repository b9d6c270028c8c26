"""What the argument parser says of a wrong recipe, as one line: which key, what was given, what is possible."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import lightning as L

from tpcompress.errors import did_you_mean
from tpcompress.training import losses, schedules, teachers
from tpcompress.training.datamodules import chat_benchmark as datamodule
from tpcompress.training.module import PruningModule

SECTIONS = ("seed_everything", "trainer", "model", "data", "checkpoints", "ckpt_path")


def readable(error: BaseException) -> str:
    """One line of an error of jsonargparse, with the nearest of what is known where a name is wrong."""
    text = str(error)
    keys = re.findall(r'Parser key "([\w.]+)"', text)
    where = f"{'.'.join(dict.fromkeys(keys))}: " if keys else ""
    given = re.search(r"Given value: (.*)", text, re.DOTALL)
    reasons = text.partition("Errors:\n")[2].partition("Given value type")[0] or text
    reasons = re.sub(r"-? *Expected a <class 'NoneType'>", "", reasons)
    reasons = re.sub(r'Parser key "[\w.]+":', "", reasons)
    reason = " ".join(reasons.replace("\n", " ").split()).strip("- ")
    unknown = re.search(r"(?:accept option|unrecognized arguments:) '?-{0,2}([\w.]+)", reason)
    option = re.search(r"given class_path '([\w.]+)': Option '(\w+)' is not accepted", reason)
    name = re.search(r"dot import path string: (\S+)", reason)
    if "arguments are required: " in reason and reason.endswith(".data"):
        return "A run needs data; give a recipe: --config recipes/tiny_llava/pool_full.yaml."
    if unknown:
        return _no_key(unknown[1])
    if option:
        return f"{where}{option[1].rpartition('.')[2]} has no '{option[2]}'; " + _known(
            option[2], _arguments(option[1])
        )
    if name:
        return f"{where}no class '{name[1]}'; " + _known(
            name[1], _classes(keys[0] if keys else ""), " or a dotted path"
        )
    reason = re.sub(r"Problem with given class_path '[\w.]+': *", "", reason)
    reason = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", reason).replace("typing.", "")
    seen = f" Got value: {' '.join(given[1].split())}." if given and "Got value" not in reason and keys else ""
    return f"{where}{reason}{seen}"


def _no_key(key: str) -> str:
    section, _, rest = key.partition(".")
    if rest and section in SECTIONS:
        wrong = rest.partition(".")[0]
        owners = {"model": PruningModule, "trainer": L.Trainer}
        known = _names(owners[section]) if section in owners else []
        return f"No key {section}.{wrong}; " + (
            _known(wrong, known) if known else f"see --help for those of {section}."
        )
    return f"No key {section}; " + _known(section, SECTIONS)


def _known(name: str, known: Iterable[str], more: str = "") -> str:
    known = list(known)
    return f"known: {', '.join(known)}{more}.{did_you_mean(name, known)}"


def _names(of: Any) -> list[str]:
    return [name for name in inspect.signature(of).parameters if name not in ("args", "kwargs")]


def _arguments(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return _names(getattr(importlib.import_module(module), name))


def _classes(key: str) -> list[str]:
    """Classes that a recipe may name at a key without a path."""
    open_sets: dict[str, type] = {"schedule": schedules.Schedule, "losses": losses.Loss, "teacher": teachers.Teacher}
    base = next((cls for word, cls in open_sets.items() if word in key), datamodule.RowsData)
    # Classes of elsewhere go by their path.
    return sorted(cls.__name__ for cls in _below(base) if cls.__module__.startswith("tpcompress.training."))


def _below(base: type) -> set[type]:
    below: set[type] = set(base.__subclasses__())
    return below.union(*(_below(cls) for cls in below))
