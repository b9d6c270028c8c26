"""Mixin of modules that are built from plain values and return them as a config: pruners and gate components."""

from __future__ import annotations

import inspect
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn


class ConfigMixin(nn.Module):
    """A module that stores its arguments under their own names, so that `config` can return them."""

    name: ClassVar[str]
    """Key in plans, YAML, tables and checkpoints."""
    test_arguments: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Arguments worth testing besides the defaults: the contract tests run with each of them."""

    def config(self) -> dict[str, Any]:
        """Name and arguments as written to config.json; a class from outside this package goes by its dotted path."""
        cls = type(self)
        inside = cls.__module__.startswith(f"{__package__}.")
        name = self.name if inside else f"{cls.__module__}.{cls.__qualname__}"
        return {"type": name} | {n: getattr(self, n) for n in self.argument_names()}

    @classmethod
    def argument_names(cls) -> list[str]:
        """Named arguments of `__init__`; a class without its own inherits nn.Module's `(*args, **kwargs)`."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return [p.name for p in parameters if p.kind not in variadic]

    @classmethod
    def argument_types(cls) -> dict[str, Any]:
        """Annotations of the arguments of `__init__`."""
        return {k: v for k, v in get_type_hints(cls.__init__).items() if k in cls.argument_names()}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "type")


SIMPLE: tuple[Any, ...] = (bool, int, float, str, NoneType)


def wrong_type(cls: type[ConfigMixin], arguments: dict[str, Any]) -> str | None:
    """Which argument has a value of a wrong type, and which type it takes; None if none has.

    Only annotations of plain values (numbers, text, choices) are checked; a class checks the others itself.
    """
    types = cls.argument_types()
    for name, value in arguments.items():
        kinds = _alternatives(types.get(name, Any))
        if kinds and not any(_fits(value, kind) for kind in kinds):
            choices = [word for kind in kinds for word in (_choices(kind) or [getattr(kind, "__name__", str(kind))])]
            wanted = " or ".join("None" if word == "NoneType" else str(word) for word in choices)
            return f"{name} must be {wanted}, got {value!r}"
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type; empty if any of them is not a plain value."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    return kinds if all(kind in SIMPLE or get_origin(kind) is Literal for kind in kinds) else ()


def _choices(kind: Any) -> list[str]:
    return [repr(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)
