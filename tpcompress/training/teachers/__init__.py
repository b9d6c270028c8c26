"""Teachers: one file each, found because it is in this folder; recipes name a teacher by its class."""

from tpcompress.open_set import classes_by_type, modules_in
from tpcompress.training.teachers.base import Teacher

modules_in(__name__)  # jsonargparse resolves the bare name of a class only after its import


def list_teachers() -> dict[str, type[Teacher]]:
    """Every teacher of this folder by class name."""
    return classes_by_type(__name__, Teacher)


__all__ = ["Teacher", "list_teachers"]
