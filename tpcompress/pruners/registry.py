"""Registry of pruners and gate components: finds the classes in their folders and builds them from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from tpcompress.errors import did_you_mean
from tpcompress.open_set import class_at, named_classes
from tpcompress.pruners.base import Pruner
from tpcompress.pruners.config_mixin import ConfigMixin, wrong_type
from tpcompress.pruners.gate_components import Applier, Part, Scorer, Selector

BASES: dict[str, type[Part]] = {"scorer": Scorer, "selector": Selector, "applier": Applier}
PACKAGE = "tpcompress.pruners"
"""Folder of the pruners, by a literal name: exports carry copies of this file in another place."""

KINDS = tuple(BASES)
"""Kinds of components of a learned gate; each has a folder of its name in the plural, with one component per file."""


@cache
def list_pruners() -> dict[str, type[Pruner]]:
    """All pruners of this folder by name; an error in any file is raised."""
    return named_classes(PACKAGE, Pruner, "pruner")


def pruner_class(name: str, allow_outside: bool = True) -> type[Pruner]:
    """The class of a registered name or of a dotted path such as `mypackage.mine.Mine`.

    Args:
        name: a registered name, or the dotted path of a `Pruner` subclass elsewhere.
        allow_outside: whether a dotted path is imported; `load` passes False unless its caller allows it.

    Raises:
        ValueError: unknown name, or a dotted path that is not a pruner or not allowed.
    """
    return _class(name, list_pruners(), Pruner, "pruner", allow_outside)


def create(config: Pruner | str | dict[str, Any], allow_outside: bool = True) -> Pruner:
    """Build a pruner from its name or from `{"type": name, **arguments}`; arguments may be such mappings, too.

    Args:
        config: name, mapping, or a pruner, which is returned as it is.
        allow_outside: see `pruner_class`; applies to nested pruners as well.

    Raises:
        ValueError: unknown name, unknown or missing argument, or an invalid value.
    """
    made = make(config, list_pruners(), Pruner, "pruner", allow_outside)
    assert isinstance(made, Pruner)
    return made


@cache
def list_parts(kind: str) -> dict[str, type[Part]]:
    """All scorers, selectors or appliers by name."""
    return named_classes(f"{PACKAGE}.{kind}s", BASES[kind], kind)


def create_part(kind: str, config: Part | str | dict[str, Any], allow_outside: bool = True) -> Any:
    """Build a gate component from its name or from `{"type": name, **arguments}`.

    Args:
        kind: one of `KINDS`.
        config: name, mapping, or a component, which is returned as it is; arguments may be mappings of pruners.
        allow_outside: whether a dotted path is imported.

    Raises:
        ValueError: unknown name, unknown or missing argument, or an invalid value.
    """
    return make(config, list_parts(kind), BASES[kind], kind, allow_outside)


def make(config: Any, known: Mapping[str, Any], base: type[ConfigMixin], kind: str, allow_outside: bool) -> Any:
    """Build a pruner or gate component from its name or mapping; see `create`.

    An argument that is a mapping with a `type` is a pruner, unless it is named `scorer`, `selector` or `applier`.
    """
    if isinstance(config, base):
        return config
    if isinstance(config, str):
        config = {"type": config}
    if not isinstance(config, Mapping) or "type" not in config:
        article = "An" if kind[0] in "aeiou" else "A"
        raise ValueError(
            f"{article} {kind} is a name or a mapping with `type`, got {config!r}. Known: {', '.join(known)}."
        )
    arguments = {name: _nested(name, value, allow_outside) for name, value in config.items()}
    cls = _class(str(arguments.pop("type")), known, base, kind, allow_outside)
    if problem := wrong_type(cls, arguments):
        raise ValueError(f"{kind.capitalize()} '{cls.name}': {problem}.")
    try:
        return cls(**arguments)
    except TypeError as error:
        names = cls.argument_names()
        raise ValueError(
            f"{kind.capitalize()} '{cls.name}': {error}; it takes {', '.join(names) or 'no arguments'}."
        ) from error


def _nested(name: str, value: Any, allow_outside: bool) -> Any:
    if not isinstance(value, Mapping) or "type" not in value:
        return value
    return create_part(name, dict(value), allow_outside) if name in KINDS else create(dict(value), allow_outside)


def _class(name: str, known: Mapping[str, Any], base: type[ConfigMixin], kind: str, allow_outside: bool) -> Any:
    if name in known:
        return known[name]
    if "." not in name:
        hint = did_you_mean(name, known)
        raise ValueError(f"No {kind} '{name}'. Known: {', '.join(known)}.{hint}")
    if not allow_outside:
        raise ValueError(
            f"{kind.capitalize()} '{name}' is outside tpcompress; load with allow_outside=True if you trust it."
        )
    return class_at(name, base, kind, f"tpcompress.{base.__name__}")
