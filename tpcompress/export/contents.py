"""What a folder may hold: the manifest, the files that it names, and others that would change what is loaded.

All ways of loading check a folder, those without tpcompress too. Sizes are checked when it loads, hashes by `verify`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MANIFEST = "manifest.json"
FORMAT = "tpcompress-export"
DENSE = "tpcompress-dense"
"""`format` of a manifest beside a stock model that was trained without a plan."""
SCHEMA = 1
AGAIN = "copy or export the folder again"

PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib)", re.IGNORECASE)
"""Files that may run code when they are read. An export has none, whatever its manifest says."""
ADAPTER = re.compile(r"adapter_(config\.json|model\..*)")
"""Adapters beside a model, which transformers applies to it. Those of an export are merged."""
READ_BY_LOADERS = re.compile(
    r".*\.(py|safetensors|index\.json|jinja|h5|msgpack|gguf|model|tiktoken)|.*config.*\.json|chat_template.*"
    r"|.*token.*\.json|vocab.*|merges.*|additional_chat_templates|custom_generate",
    re.IGNORECASE,
)
"""Names that loaders of transformers look for: one that the manifest does not name would change what is loaded."""


def check_contents(folder: Path, model_type: str | None = None, architecture: str | None = None) -> None:
    """Check a folder before anything in it is loaded. A folder that was saved again has no manifest.

    Args:
        folder: local folder.
        model_type: that of the class which is about to load it; None does not compare it.
        architecture: name of that class; None does not compare it.

    Raises:
        ValueError: pickles or adapters, files that the manifest does not name and that would change what is loaded,
            missing or truncated files, a manifest that disagrees with config.json, or the model of another family.
    """
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if PICKLE.fullmatch(name):
            raise ValueError(f"{folder / name} may hold code, and an export has no such file; remove it.")
        if ADAPTER.fullmatch(name):
            raise ValueError(f"{folder / name} is an adapter, which an export has merged; remove it.")
    config = read_json(folder / "config.json")
    if model_type is not None and config.get("model_type") != model_type:
        raise ValueError(
            f"{folder} holds a '{config.get('model_type')}' model, but '{model_type}' is to be loaded; {AGAIN}."
        )
    if architecture is not None and config.get("architectures") not in (None, [architecture]):
        raise ValueError(f"{folder} holds weights of {config['architectures']}, not of {architecture}; {AGAIN}.")
    if not (folder / MANIFEST).is_file():
        return
    manifest = read_manifest(folder)
    damaged = unusable_files(damaged_files(folder, manifest, hashes=False), folder)
    if damaged:
        name, what = next(iter(damaged.items()))
        raise ValueError(f"{folder / name} {what}; {AGAIN}.")
    odd = next((name for name in names if name not in _tops(manifest) and READ_BY_LOADERS.fullmatch(name)), None)
    if odd is not None:
        raise ValueError(f"{folder / odd} would change what is loaded, but {MANIFEST} does not name it; remove it.")
    if reason := disagreement(manifest, config):
        raise ValueError(f"{folder / MANIFEST} and config.json disagree: {reason}; {AGAIN}.")


def disagreement(manifest: dict[str, Any], config: dict[str, Any]) -> str | None:
    """How a manifest and config.json contradict each other; None if they do not.

    A config without a plan is left to the model class, which refuses it.
    """
    base, plan = manifest.get("base"), config.get("token_pruning")
    expected = base.get("model_type") if isinstance(base, dict) else None
    if config.get("model_type") != f"tpcompress_{expected}":
        return f"a base of type '{expected}' against a '{config.get('model_type')}' model"
    if plan is not None and "plan" in manifest and plan != manifest["plan"]:
        return "they hold different plans"
    return None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of an export.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, damaged, names of files outside of the folder, or written by a newer tpcompress.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}; give one that tpcompress.export wrote.")
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}, so it is no export of tpcompress; give one, or export again.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") == DENSE:
        raise ValueError(f"{folder} holds a dense model without a plan; load it with transformers, or as a base.")
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict):
        raise ValueError(f"{folder / MANIFEST} is not of a tpcompress export; give one, or export again.")
    if manifest.get("schema") != SCHEMA:
        raise ValueError(
            f"{folder} has manifest schema {manifest.get('schema')!r}, this tpcompress reads {SCHEMA}; "
            f"update tpcompress."
        )
    for name, record in files.items():
        if not _inside(name):
            raise ValueError(f"{folder / MANIFEST} names a file outside of the folder, {name[:80]!r}; {AGAIN}.")
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys():
            raise ValueError(f"{folder / MANIFEST} is damaged (no size and sha256 of {name[:80]!r}); {AGAIN}.")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {AGAIN}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (it holds no mapping); {AGAIN}.")
    return values


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
    """Damage that prevents loading: missing files and truncated weights. Edited text files are left to `verify`."""
    return {n: what for n, what in damaged.items() if not (folder / n).is_file() or ("bytes" in what and _binary(n))}


def unnamed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that the manifest does not name, without hidden ones, which no loader reads."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() not in {MANIFEST, *manifest["files"]}:
            found.append(name.as_posix())
    return found


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inside(name: str) -> bool:
    """Whether the name of a file stays in its folder, on any system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    absolute = posix.is_absolute() or windows.is_absolute() or bool(windows.drive or windows.root)
    return bool(name) and not absolute and ".." not in (*posix.parts, *windows.parts)


def _tops(manifest: dict[str, Any]) -> set[str]:
    """First parts of the names in a manifest."""
    return {MANIFEST, *(PurePosixPath(name).parts[0] for name in manifest["files"])}


def _binary(name: str) -> bool:
    return name.endswith((".safetensors", ".tensors"))
