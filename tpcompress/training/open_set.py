"""Open sets (losses, teachers, schedules): a class belongs to the set because its file is in the folder of the set."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def import_files(package: str, path: Iterable[str]) -> None:
    """Import every file of a package, because jsonargparse resolves the bare name of a class only after its import.

    Args:
        package: dotted name of the package.
        path: its `__path__`.
    """
    for found in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{found.name}")


def classes_in(package: str, base: type[T]) -> dict[str, type[T]]:
    """Every class below `base` that is defined in a package, by class name, sorted."""
    inside = {cls.__name__: cls for cls in below(base) if cls.__module__.startswith(f"{package}.")}
    return dict(sorted(inside.items()))


def below(base: type[T]) -> set[type[T]]:
    """All direct and indirect subclasses of a class that are imported."""
    found: set[type[T]] = set(base.__subclasses__())
    return found.union(*(below(cls) for cls in found))
