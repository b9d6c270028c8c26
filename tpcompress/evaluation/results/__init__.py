"""Result files of other evaluation harnesses, one reader per file of this folder, found by being here."""

from __future__ import annotations

from functools import cache

from tpcompress.errors import did_you_mean
from tpcompress.evaluation.results.base import Measured, Model, Reader
from tpcompress.open_set import named_classes

__all__ = ["Measured", "Model", "Reader", "find_reader", "list_readers"]


@cache
def list_readers() -> dict[str, type[Reader]]:
    """Every reader by the name of its harness, which is its key in a comparison file."""
    return named_classes(__name__, Reader, "reader")


def find_reader(name: str) -> Reader:
    """The reader of a harness.

    Raises:
        ValueError: there is none.
    """
    known = list_readers()
    if name not in known:
        raise ValueError(f"No harness '{name}'; known: {', '.join(known)}.{did_you_mean(name, known)}")
    return known[name]()
