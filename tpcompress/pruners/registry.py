"""Pruners by name: found by being in this folder, made from plain values."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from tpcompress.pruners.base import Pruner


@cache
def list_pruners() -> dict[str, type[Pruner]]:
    """Every pruner of this folder by name. A broken file breaks loudly."""
    found: dict[str, type[Pruner]] = {}
    package = importlib.import_module(__package__ or "")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Pruner) and value.__module__ == module.__name__:
                if "name" not in vars(value):  # what several pruners build on
                    continue
                if value.name in found:
                    raise ValueError(
                        f"Two pruners are named '{value.name}': {found[value.name]} and {value}; rename one."
                    )
                found[value.name] = value
    return dict(sorted(found.items()))


def pruner_class(name: str, allow_outside: bool = True) -> type[Pruner]:
    """The class behind a name, or behind a dotted path such as `mypackage.mine.Mine`.

    Args:
        name: a registered name, or the dotted path of a `Pruner` subclass elsewhere.
        allow_outside: whether a dotted path is imported; loading a checkpoint says no unless its user says yes.

    Raises:
        ValueError: unknown name, or a dotted path that is not a pruner or not allowed.
    """
    known = list_pruners()
    if name in known:
        return known[name]
    if "." not in name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"No pruner '{name}'. Known: {', '.join(known)}.{hint}")
    if not allow_outside:
        raise ValueError(f"Pruner '{name}' is outside tpcompress; load with allow_outside=True if you trust it.")
    path, _, attribute = name.rpartition(".")
    try:
        value = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Pruner '{name}' cannot be imported ({error}); give the dotted path of its class.") from error
    if not (isinstance(value, type) and issubclass(value, Pruner)):
        raise ValueError(f"'{name}' is not a Pruner; subclass tpcompress.Pruner.")
    return value


def create(config: Pruner | str | dict[str, Any], allow_outside: bool = True) -> Pruner:
    """A pruner from its name, from `{"type": name, **arguments}`, or as it is; arguments may be such mappings, too.

    Args:
        config: what to make.
        allow_outside: see `pruner_class`; it holds for pruners inside this one as well.

    Raises:
        ValueError: unknown name, unknown or missing argument, or a value that the pruner refuses.
    """
    if isinstance(config, Pruner):
        return config
    if isinstance(config, str):
        config = {"type": config}
    if not isinstance(config, dict) or "type" not in config:
        raise ValueError(
            f"A pruner is a name or a mapping with `type`, got {config!r}. Known: {', '.join(list_pruners())}."
        )
    nested = {k: v for k, v in config.items() if isinstance(v, dict) and "type" in v}
    arguments = config | {name: create(inside, allow_outside) for name, inside in nested.items()}
    cls = pruner_class(str(arguments.pop("type")), allow_outside)
    try:
        return cls(**arguments)
    except TypeError as error:
        names = cls.argument_names()
        raise ValueError(f"Pruner '{cls.name}': {error}; it takes {', '.join(names) or 'no arguments'}.") from error
