"""Teachers: one file each, found because it is in this folder; recipes name a teacher by its class."""

from tpcompress.training.open_set import classes_in, import_files
from tpcompress.training.teachers.base import Teacher

import_files(__name__, __path__)


def list_teachers() -> dict[str, type[Teacher]]:
    """Every teacher of this folder by class name."""
    return classes_in(__name__, Teacher)


__all__ = ["Teacher", "list_teachers"]
