"""Runtimes that may run an export: one file each, found automatically.

Every file has one subclass of `Runtime`, which returns None for a plan that its runtime can run on a model, or one line
with the reason why it cannot.
"""

from tpcompress.export.runtimes.base import Runtime, list_runtimes, report, runtime_lines, runtimes_of

__all__ = ["Runtime", "list_runtimes", "report", "runtime_lines", "runtimes_of"]
