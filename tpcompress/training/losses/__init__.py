"""Losses: one file each, found because it is in this folder; recipes name a loss by its class."""

from tpcompress.training.losses.base import Loss, Ramp, needs_of, weighed
from tpcompress.training.losses.label import Label
from tpcompress.training.open_set import classes_in, import_files

import_files(__name__, __path__)


def list_losses() -> dict[str, type[Loss]]:
    """Every loss of this folder by class name."""
    return classes_in(__name__, Loss)


__all__ = ["Label", "Loss", "Ramp", "list_losses", "needs_of", "weighed"]
