"""Signatures of methods that are called with an explicit `self` or through a stand-in."""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def parameters_of(forward: Any) -> tuple[str, ...]:
    """Parameter names of a method without `self`; cached because every layer call reads them."""
    return tuple(inspect.signature(forward).parameters)[1:]


def unbound_signature(function: Any) -> inspect.Signature:
    """Signature of a method without `self`."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward call by name, in a new dict."""
    return dict(zip(parameters_of(type(module).forward), args, strict=False)) | kwargs
