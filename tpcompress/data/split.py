"""Hold out rows such that no image of theirs is among the training rows."""

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image

DIGEST_SIZE = 16
HEAD = 1 << 16
"""Bytes of a file that are compared, beside its length."""


def held_out(
    rows: Any, fraction: float | None = None, *, count: int | None = None, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Split rows into training and held-out ones; rows that share an image or a video stay on the same side.

    Files and bytes are the same if their length and their first 64 KiB are. Groups of rows are drawn at random; a group
    that would exceed the number is passed over, so fewer rows than asked for can be held out.

    Args:
        rows: sequence of rows, such as a data set of `load_chat`.
        fraction: share of the rows to hold out, at least one row; or
        count: number of rows to hold out.
        seed: seed of the draw.

    Returns:
        indices of the training rows and of the held-out rows, both in the order of the data.

    Raises:
        ValueError: neither or both of `fraction` and `count`, fewer than two rows, or all rows share images.
    """
    if (fraction is None) == (count is None):
        raise ValueError("Give either the fraction or the count of rows to hold out.")
    number = len(rows)
    if number < 2:
        raise ValueError(f"Holding out rows needs at least 2 usable rows, got {number}; give validation data instead.")
    wanted = count if count is not None else round((fraction or 0) * number)
    wanted = min(max(1, wanted), number - 1)
    groups = groups_of(rows)
    if len(groups) < 2:
        raise ValueError(
            f"All {number} rows share images, so none can be held out without training on its image; give validation "
            "data instead."
        )
    held: list[int] = []
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        if len(held) + len(groups[index]) <= wanted:
            held += groups[index]
    if not held:
        held = min((groups[index] for index in order), key=len)
    chosen = set(held)
    return [index for index in range(number) if index not in chosen], sorted(held)


def groups_of(rows: Any) -> list[list[int]]:
    """Indices of the rows in groups; rows that share an image or a video, also by way of other rows, are in one."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[bytes, int] = {}
    for index in range(len(rows)):
        row = rows[index]
        for medium in (*row["images"], *(row.get("videos") or ())):
            for digest in _digests(medium):
                parent[root(index)] = root(first_with.setdefault(digest, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def _digests(medium: Any) -> Iterator[bytes]:
    """Hashes of an image or video of a row, by content or path: one, or one per frame."""
    if isinstance(medium, list | tuple):
        for frame in medium:
            yield from _digests(frame)
        return
    if isinstance(medium, Image.Image):
        content = f"{medium.mode} {medium.size}".encode() + medium.tobytes()
    elif isinstance(medium, dict) and medium.get("bytes") is not None:
        content = f"{len(medium['bytes'])} ".encode() + medium["bytes"][:HEAD]
    elif isinstance(medium, dict | str | Path):
        content = _start_of(str(medium["path"] if isinstance(medium, dict) else medium))
    else:  # an array of frames
        content = medium.tobytes()
    yield blake2b(content, digest_size=DIGEST_SIZE).digest()


def _start_of(path: str) -> bytes:
    """Length and first bytes of a file; the path itself if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return f"{os.fstat(file.fileno()).st_size} ".encode() + file.read(HEAD)
    except OSError:
        return path.encode("utf-8", "surrogateescape")
