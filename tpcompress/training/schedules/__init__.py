"""Budget schedules: one file each, found because it is in this folder; recipes name a schedule by its class."""

from tpcompress.training.open_set import classes_in, import_files
from tpcompress.training.schedules.base import Schedule, draw_for, progress_at
from tpcompress.training.schedules.constant import Constant

import_files(__name__, __path__)


def list_schedules() -> dict[str, type[Schedule]]:
    """Every schedule of this folder by class name."""
    return classes_in(__name__, Schedule)


def __getattr__(name: str) -> type[Schedule]:
    """Any schedule of this folder as `schedules.<class>`: recipes saved by runs contain this path."""
    found = list_schedules()
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[name]


__all__ = ["Constant", "Schedule", "draw_for", "list_schedules", "progress_at"]
