"""Losses: one file each, found because it is in this folder; recipes name a loss by its class."""

from tpcompress.open_set import classes_by_type, modules_in
from tpcompress.training.losses.base import Loss, Ramp, needs_of, weighed
from tpcompress.training.losses.label import Label

modules_in(__name__)  # jsonargparse resolves the bare name of a class only after its import


def list_losses() -> dict[str, type[Loss]]:
    """Every loss of this folder by class name."""
    return classes_by_type(__name__, Loss)


__all__ = ["Label", "Loss", "Ramp", "list_losses", "needs_of", "weighed"]
