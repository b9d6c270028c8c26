"""Exclusive claims on files of a folder that several processes fill."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold a lock file while a piece of work is done; yields False if another process holds it.

    The kernel holds the lock, not the existence of the file: it is released however a process ends, so there are no
    stale locks. The file is not removed, because then two processes could hold two files of one name.

    Args:
        path: the lock file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield True
