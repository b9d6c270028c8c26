"""Modules that are made from plain values and can say from which: pruners, and the parts of a learned one."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import nn


class ConfigMixin(nn.Module):
    """A module that keeps its arguments under their own names, so that `config` comes for free."""

    name: ClassVar[str]

    def config(self) -> dict[str, Any]:
        """Its name and arguments, as they are written to config.json.

        A class from outside this package goes by its dotted path, which is how it is found again.
        """
        cls = type(self)
        inside = cls.__module__.startswith(f"{__package__}.")
        name = self.name if inside else f"{cls.__module__}.{cls.__qualname__}"
        return {"type": name} | {n: getattr(self, n) for n in self.argument_names()}

    @classmethod
    def argument_names(cls) -> list[str]:
        """What `__init__` takes by name; a class without one inherits nn.Module's `(*args, **kwargs)`."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return [p.name for p in parameters if p.kind not in variadic]

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "type")
