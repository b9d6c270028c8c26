"""The public list of pruners: filtered by a wildcard pattern, as classes or with one-line descriptions."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, overload

from tpcompress.errors import did_you_mean
from tpcompress.pruners import registry
from tpcompress.pruners.base import Pruner
from tpcompress.pruners.catalogue import retains


@overload
def list_pruners(pattern: str = "*", with_description: Literal[False] = False) -> dict[str, type[Pruner]]: ...


@overload
def list_pruners(pattern: str = "*", *, with_description: Literal[True]) -> dict[str, str]: ...


def list_pruners(pattern: str = "*", with_description: bool = False) -> dict[str, type[Pruner]] | dict[str, str]:
    """List pruners by name: `list_pruners("div*", with_description=True)`.

    Args:
        pattern: wildcard pattern that names must match.
        with_description: return a one-line description of each pruner instead of its class.

    Raises:
        ValueError: a pattern without wildcards that is not a pruner.
    """
    known = registry.list_pruners()
    found = {name: cls for name, cls in known.items() if fnmatchcase(name, pattern)}
    if not found and not set(pattern) & set("*?["):
        raise ValueError(f"No pruner '{pattern}'. Known: {', '.join(known)}.{did_you_mean(pattern, known)}")
    return {name: retains(cls) for name, cls in found.items()} if with_description else found
