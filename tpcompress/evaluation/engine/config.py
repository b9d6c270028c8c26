"""Files that say what to measure: a YAML mapping becomes a dataclass, and what is wrong in it one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from tpcompress.bundled import find_config
from tpcompress.errors import read_yaml


def read_settings(path: str, examples: str) -> dict[str, Any]:
    """The keys of a file, or of the bundled recipe of that name.

    Args:
        path: of the file.
        examples: keys that such a file has, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no mapping.
    """
    values = read_yaml(find_config(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a mapping; it has keys such as {examples}.")
    return values


@contextmanager
def keys_of(kind: type, path: str) -> Iterator[None]:
    """Turns Python's complaint about an argument that `kind`, or a part of it, does not take into one about the file.

    Raises:
        ValueError: a key is unknown, or missing.
    """
    try:
        yield
    except TypeError as error:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"{path}: {str(error).partition(') ')[2] or error}; known keys: {known}.") from error
