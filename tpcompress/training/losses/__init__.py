"""Losses: one file each, found by being here; a recipe names them by class."""

import importlib
import pkgutil

from tpcompress.training.losses.base import Loss, Ramp, needs_of, weighed
from tpcompress.training.losses.label import Label

# Recipes know a class by its name alone once it is imported. A broken file breaks loudly.
for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")


def list_losses() -> dict[str, type[Loss]]:
    """Every loss of this folder by name."""
    inside = [cls for cls in Loss.__subclasses__() if cls.__module__.startswith(f"{__name__}.")]
    return {cls.name: cls for cls in sorted(inside, key=lambda cls: cls.name)}


__all__ = ["Label", "Loss", "Ramp", "list_losses", "needs_of", "weighed"]
