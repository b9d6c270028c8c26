"""What the documentation shows of losses, teachers and schedules, read from their classes; no model is built."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tpcompress.training.losses import list_losses
from tpcompress.training.schedules import list_schedules
from tpcompress.training.teachers import list_teachers


@dataclass(frozen=True)
class Entry:
    """One class of an open set.

    Attributes:
        name: class name, as recipes write it.
        summary: first paragraph of its docstring.
        arguments: defaults as YAML, by argument; `required` for arguments without a default.
        paper: arXiv number of its first source; empty for methods of this package.
        description: documentation of its file and of its class.
    """

    name: str
    summary: str
    arguments: dict[str, str]
    paper: str
    description: str


def losses() -> list[Entry]:
    """Every loss."""
    return _entries(list_losses())


def teachers() -> list[Entry]:
    """Every teacher."""
    return _entries(list_teachers())


def schedules() -> list[Entry]:
    """Every schedule."""
    return _entries(list_schedules())


def _entries(classes: Mapping[str, type]) -> list[Entry]:
    return [_entry(name, cls) for name, cls in classes.items()]


def _entry(name: str, cls: type) -> Entry:
    own = inspect.getdoc(cls) or ""
    source = re.search(r"arXiv\s+(\d{4}\.\d{4,5})", own)
    return Entry(
        name=name,
        summary=" ".join(own.partition("\n\n")[0].split()),
        arguments=_arguments(cls),
        paper=source[1] if source else "",
        description=f"{inspect.getdoc(sys.modules[cls.__module__]) or ''}\n\n{own}",
    )


def _arguments(cls: type) -> dict[str, str]:
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        default = parameter.default
        found[name] = "required" if default is inspect.Parameter.empty else _yaml(default)
    return found


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
