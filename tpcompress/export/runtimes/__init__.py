"""Runtimes that may run an export: one file each, found automatically.

Every file has one subclass of `Runtime`, which returns None for a plan that its runtime can run on a model, or one line
with the reason why it cannot.
"""

from tpcompress.export.runtimes.base import Runtime, list_runtimes, report, runtime_lines, runtimes_of
from tpcompress.export.runtimes.engines import engines_of, not_servable, served_by

__all__ = [
    "Runtime", "engines_of", "list_runtimes", "not_servable", "report", "runtime_lines", "runtimes_of", "served_by",
]  # fmt: skip
