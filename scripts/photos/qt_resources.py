"""Read the files inside a compiled Qt resource (`.rcc`), as the packages of Qt programs store their pictures.

Format: https://doc.qt.io/qt-6/resources.html describes the tool; the layout of the file follows from Qt's `rcc` output.
All numbers are big-endian. A header names the places of three blocks: the tree (fixed-size entries), the data and the
names. Entry 0 is the root folder.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct(">4sIIII")
_ENTRY = struct.Struct(">IHII")
_COMPRESSED, _FOLDER = 1, 2
_ENTRY_SIZES = {1: 14, 2: 22, 3: 22}
"""Bytes of an entry by format version; later versions append the time of the last change."""


def resource_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a resource with its content, in the order of the tree; names such as `/images/dam.webp`.

    Raises:
        ValueError: not a resource file, or of a version or compression that is not known.
    """
    content = path.read_bytes()
    if len(content) < _HEADER.size or content[:4] != b"qres":
        raise ValueError(f"{path.name} is no compiled Qt resource; give an .rcc file.")
    _, version, tree, data, names = _HEADER.unpack_from(content)
    if version not in _ENTRY_SIZES:
        raise ValueError(f"{path.name} has format version {version}; known are {', '.join(map(str, _ENTRY_SIZES))}.")
    yield from _walk(content, path.name, tree, data, names, _ENTRY_SIZES[version])


def _walk(content: bytes, source: str, tree: int, data: int, names: int, size: int) -> Iterator[tuple[str, bytes]]:
    waiting = [(0, "")]
    while waiting:
        number, folder = waiting.pop()
        name_at, flags, first, second = _ENTRY.unpack_from(content, tree + number * size)
        name = folder if number == 0 else f"{folder}/{_name(content, names + name_at)}"
        if flags & _FOLDER:  # first: number of children, second: the entry of the first of them
            waiting += [(second + child, name) for child in reversed(range(first))]
            continue
        (start,) = struct.unpack_from(">I", content, tree + number * size + 10)
        (length,) = struct.unpack_from(">I", content, data + start)
        stored = content[data + start + 4 : data + start + 4 + length]
        if flags & ~(_COMPRESSED | _FOLDER):
            raise ValueError(f"{source}: {name} is stored in a way (flags {flags}) that is not known.")
        yield name, zlib.decompress(stored[4:]) if flags & _COMPRESSED else stored


def _name(content: bytes, at: int) -> str:
    """A name: its length, a hash, then UTF-16."""
    (length,) = struct.unpack_from(">H", content, at)
    return content[at + 6 : at + 6 + 2 * length].decode("utf-16-be")
