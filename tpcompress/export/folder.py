"""Writes folders atomically and reads exported ones: manifest, file sizes, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpcompress.export.registry import exported_types

MANIFEST = "manifest.json"
FORMAT = "tpcompress-export"
DENSE = "tpcompress-dense"
"""`format` of a manifest beside a stock model that was trained without a plan."""
SCHEMA = 1


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
        if read_json(out / MANIFEST).get("format") != DENSE:
            read_manifest(out)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"{out} is not an export of tpcompress, so it is not overwritten; choose another folder."
        ) from error


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of an export.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, damaged, or written by a newer tpcompress.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}; give one that tpcompress.export wrote.")
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}, so it is no export of tpcompress; give one, or export again.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") == DENSE:
        raise ValueError(f"{folder} holds a dense model without a plan; load it with transformers, or as a base.")
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{folder / MANIFEST} is not of a tpcompress export; give one, or export again.")
    if manifest.get("schema") != SCHEMA:
        raise ValueError(
            f"{folder} has manifest schema {manifest.get('schema')!r}, this tpcompress reads {SCHEMA}; "
            f"update tpcompress."
        )
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy or export the folder again.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or export the folder again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (it holds no mapping); copy or export the folder again.")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file except the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }


def damaged_files(folder: Path, manifest: dict[str, Any], hashes: bool) -> dict[str, str]:
    """Damaged files and their damage: missing, another size, or (with `hashes`) other content."""
    found: dict[str, str] = {}
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found[name] = "is missing"
        elif path.stat().st_size != record["bytes"]:
            found[name] = f"has {path.stat().st_size} bytes instead of {record['bytes']}"
        elif hashes and sha256(path) != record["sha256"]:
            found[name] = "has another sha256"
    return found


def unusable_files(damaged: dict[str, str], folder: Path) -> dict[str, str]:
    """Damage that prevents a replay: missing files and truncated weights. Edited text files are replayed."""
    return {n: what for n, what in damaged.items() if not (folder / n).is_file() or ("bytes" in what and _binary(n))}


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


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _binary(name: str) -> bool:
    return name.endswith((".safetensors", ".tensors"))


def _share(folder: Path) -> None:
    """Give a temporary folder, which is private, the permissions of any other new folder."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
