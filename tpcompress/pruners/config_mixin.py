"""Mixin of modules that are built from plain values and return them as a config: pruners and gate components."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

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

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "type")
