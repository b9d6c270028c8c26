"""Teachers: one file each, found by being here; a recipe names one by class."""

import importlib
import pkgutil

from tpcompress.training.teachers.base import Teacher

# Recipes know a class by its name alone once it is imported. A broken file breaks loudly.
for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")


def list_teachers() -> dict[str, type[Teacher]]:
    """Every teacher of this folder by class name."""
    inside = [cls for cls in Teacher.__subclasses__() if cls.__module__.startswith(f"{__name__}.")]
    return {cls.__name__: cls for cls in sorted(inside, key=lambda cls: cls.__name__)}


__all__ = ["Teacher", "list_teachers"]
