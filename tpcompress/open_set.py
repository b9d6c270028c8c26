"""Open sets: a pruner, family, loss, task or metric belongs to its set because its file is in the folder of the set."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from tpcompress.errors import first_line

T = TypeVar("T")


def modules_in(package: str) -> list[ModuleType]:
    """Import every file of a package; an error in any file is raised."""
    path = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(path)]


def named_classes(package: str, base: type[T], kind: str) -> dict[str, type[T]]:
    """Every subclass of `base` in the files of a package that declares a `name`, by that name, sorted.

    Args:
        package: dotted name of the package.
        base: base class of the set; a subclass without a `name` of its own is a shared base class.
        kind: singular noun for error messages.

    Raises:
        ValueError: two classes have the same name.
    """
    found: dict[str, type[T]] = {}
    for module in modules_in(package):
        for value in vars(module).values():
            defined_here = isinstance(value, type) and value.__module__ == module.__name__
            if not defined_here or not issubclass(value, base) or "name" not in vars(value):
                continue
            name = vars(value)["name"]
            if name in found:
                raise ValueError(f"Two {kind}s are named '{name}': {found[name]} and {value}; rename one.")
            found[name] = value
    return dict(sorted(found.items()))


def class_at(path: str, base: type[T], kind: str, public: str) -> type[T]:
    """A class outside the package by its dotted path, `package.module.Class` or `package.module:Class`.

    Args:
        path: dotted path.
        base: class that it must be derived from.
        kind: singular noun for error messages.
        public: dotted path of `base` for users.

    Raises:
        ValueError: there is no such class, or it is not of this kind.
    """
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ValueError(f"{kind.capitalize()} '{path}' is neither a name nor a dotted path.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{kind.capitalize()} '{path}' cannot be imported ({first_line(error)}); give the dotted path of its class."
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"'{path}' is not a {base.__name__}; subclass {public}.")
    return found


def classes_by_type(package: str, base: type[T]) -> dict[str, type[T]]:
    """Every imported subclass of `base` that is defined in a package, by class name, sorted."""
    inside = {cls.__name__: cls for cls in subclasses(base) if cls.__module__.startswith(f"{package}.")}
    return dict(sorted(inside.items()))


def subclasses(base: type[T]) -> set[type[T]]:
    """All direct and indirect subclasses of a class that are imported."""
    found: set[type[T]] = set(base.__subclasses__())
    return found.union(*(subclasses(cls) for cls in found))
