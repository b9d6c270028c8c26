"""Keeps what `list`, `pruners` and `families` printed, so that the same command is answered without importing torch.

The facts of a pruner or family come from its class, and importing all of them takes seconds. Texts are kept in the
user's cache folder for one state of the package: any change of a source file, or another version of torch or
transformers, makes a new one.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

PACKAGE = Path(__file__).parents[1]
FRAMEWORKS = ("torch", "transformers", "torchvision", "num2words")
"""Packages whose versions, or absence, the lists depend on."""


def print_kept(console: Console, asked: Sequence[str], write: Callable[[Console], None]) -> None:
    """Print what `write` prints, from the cache if it was printed before.

    Nothing is read or kept in a process that has torch already, where registries may have been changed, nor for classes
    outside the package.

    Args:
        console: console to print to.
        asked: the arguments that decide the text.
        write: prints to a console of the same width and colours.
    """
    if "torch" in sys.modules or any("." in word or ":" in word for word in asked):
        return write(console)
    form = [str(console.width), str(console.is_terminal), str(console.color_system), *asked]
    file = cache_folder() / state() / f"{hashlib.sha256(chr(0).join(form).encode()).hexdigest()[:24]}.txt"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        text = _captured(console, write)
        _keep(file, text)
    console.file.write(text)
    console.file.flush()
    return None


def cache_folder() -> Path:
    """The folder of the texts."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tpcompress" / "lists"


def state() -> str:
    """A name for the sources of the package and the versions of what they import."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml")]):
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for name in FRAMEWORKS:
        digest.update(f"{name} {_version(name)}\n".encode())
    return digest.hexdigest()[:24]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _captured(console: Console, write: Callable[[Console], None]) -> str:
    text = io.StringIO()
    write(
        Console(
            file=text, width=console.width, force_terminal=console.is_terminal, color_system=console.color_system,  # type: ignore[arg-type]
            legacy_windows=False,
        )
    )  # fmt: skip
    return text.getvalue()


def _keep(file: Path, text: str) -> None:
    """Write the text, and remove those of other states; a folder that cannot be written is no error."""
    with suppress(OSError):
        for other in file.parent.parent.iterdir() if file.parent.parent.is_dir() else ():
            if other != file.parent:
                shutil.rmtree(other, ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        part.replace(file)
