"""Exclusive claims on files of a folder that several processes fill."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold a lock file while a piece of work is done; yields whether it could be had.

    The lock is the kernel's, not the file's existence: a process that dies, however it dies, lets go, so there is no
    stale lock to recover. The file stays; removing it would let two processes hold two files of one name.

    Args:
        path: of the lock file; its folder is made.
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
