"""Atomic file writes: a file is either complete or unchanged, even if the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder and with the same suffix, which replaces `path` if the block succeeds.

    The temporary name contains the process id, so that several processes can write the same file. After an exception
    the temporary file is removed and `path` is unchanged.
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
    """Write a UTF-8 text file atomically; its folder is created."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
