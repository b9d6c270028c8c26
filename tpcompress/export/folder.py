"""Writes folders atomically, and the records of their files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpcompress.export.contents import DENSE, FORMAT, MANIFEST, SCHEMA, read_json, read_manifest, sha256
from tpcompress.export.registry import exported_types

__all__ = [
    "DENSE", "FORMAT", "MANIFEST", "SCHEMA", "check_free", "exported_type", "file_records", "new_folder", "read_json",
    "read_manifest", "write_json",
]  # fmt: skip

ONNX = "tpcompress-onnx"
"""`format` of the manifest beside an ONNX graph."""


@contextmanager
def new_folder(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, which is renamed to `out` if the block succeeds and removed if it fails.

    A killed process leaves at most a hidden folder `.NAME.*.partial`, never a half-written `out`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is off, or it is not an earlier export.
        FileNotFoundError: the parent folder of `out` cannot be created.
    """
    out = Path(out)
    check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield partial
        _share(partial)
        check_free(out, overwrite)
        if out.is_dir():
            old = partial.with_suffix(".old")
            out.rename(old)
            try:
                partial.rename(out)
            except OSError:
                old.rename(out)
                raise
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(out: Path, overwrite: bool) -> None:
    """Check that `out` may be written.

    Raises:
        FileExistsError: it exists and `overwrite` is off, or it is not an earlier export.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(
            f"{out} exists already; choose another folder, or replace it: overwrite=True, --overwrite."
        )
    if out.is_symlink() or not out.is_dir():
        raise FileExistsError(f"{out} is not a folder; choose another place for the export.")
    if not any(out.iterdir()):
        return
    try:
        if read_json(out / MANIFEST).get("format") not in (DENSE, ONNX):
            read_manifest(out)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"{out} is not an export of tpcompress, so it is not overwritten; choose another folder."
        ) from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file except the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }


def exported_type(folder: Path) -> str:
    """The `model_type` of an exported folder's config.json.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: damaged, or of a model without a plan.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in exported_types():
        raise ValueError(
            f"{folder} holds a '{model_type}' model, not an export of tpcompress; load it with transformers and "
            f"attach a plan with tpcompress.attach."
        )
    return model_type


def _share(folder: Path) -> None:
    """Give a temporary folder, which is private, the permissions of any other new folder."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
