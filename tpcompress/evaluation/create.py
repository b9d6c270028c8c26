"""Tasks and metrics made from their names and plain values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from tpcompress.errors import did_you_mean

T = TypeVar("T")


def create_from(known: Mapping[str, type[T]], base: type[T], kind: str, config: Any) -> T:
    """An object from its name, from `{"type": name, **arguments}`, or as it is.

    Args:
        known: classes by name.
        base: the class that they derive from.
        kind: word for one of them, for the message.
        config: what to make.

    Raises:
        ValueError: unknown name, unknown or missing argument, or a value that the class refuses.
    """
    if isinstance(config, base):
        return config
    values = {"type": config} if isinstance(config, str) else config
    if not isinstance(values, Mapping) or not isinstance(values.get("type"), str):
        raise ValueError(f"A {kind} is a name or a mapping with `type`, got {config!r}; known: {', '.join(known)}.")
    arguments = {str(key): value for key, value in values.items() if key != "type"}
    name = values["type"]
    if name not in known:
        raise ValueError(f"No {kind} '{name}'; known: {', '.join(known)}.{did_you_mean(name, known)}")
    names = argument_names(known[name])
    unknown = sorted(set(arguments) - set(names))
    if unknown:
        takes = ", ".join(names) or "no arguments"
        raise ValueError(f"{kind.capitalize()} '{name}' has no argument {', '.join(unknown)}; it takes {takes}.")
    try:
        return known[name](**arguments)
    except TypeError as error:
        raise ValueError(f"{kind.capitalize()} '{name}': {error}; it takes {', '.join(names)}.") from error


def argument_names(cls: type) -> list[str]:
    """What `__init__` takes by name; empty for a class without an `__init__` of its own."""
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return []
    return list(inspect.signature(cls).parameters)
