"""Budget schedules: one file each, found because it is in this folder; recipes name a schedule by its class."""

from tpcompress.open_set import classes_by_type, modules_in
from tpcompress.training.schedules.base import Schedule, draw_for, progress_at
from tpcompress.training.schedules.constant import Constant

modules_in(__name__)  # jsonargparse resolves the bare name of a class only after its import


def list_schedules() -> dict[str, type[Schedule]]:
    """Every schedule of this folder by class name."""
    return classes_by_type(__name__, Schedule)


def __getattr__(name: str) -> type[Schedule]:
    """Any schedule of this folder as `schedules.<class>`: recipes saved by runs contain this path."""
    found = list_schedules()
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[name]


__all__ = ["Constant", "Schedule", "draw_for", "list_schedules", "progress_at"]
