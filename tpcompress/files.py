"""Atomic writes: a reader, or a process that is killed, never sees half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix, which replaces `path` if the block succeeds.

    The name holds the process id, so that several processes may write the same file. After an exception the temporary
    file is removed and `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file in one step; its folder is made."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
