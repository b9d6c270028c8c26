"""Helpers for one-line error messages: first line of an exception, suggestion for a misspelt name, YAML errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

EXTRAS = {
    "accelerate": "train", "datasets": "train", "deepspeed": "train", "lightning": "train", "peft": "train",
    "tensorboard": "train", "torchmetrics": "train", "xxhash": "train", "matplotlib": "eval", "openpyxl": "eval",
    "av": "media", "num2words": "media", "torchvision": "media", "fastapi": "serve", "uvicorn": "serve",
    "openai": "serve", "pydantic": "serve", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx",
}  # fmt: skip
"""Packages outside the core, by the extra of tpcompress that installs them."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without a final full stop; its type if the message is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:") or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the known name that is closest to `name`; empty if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun, which gets an s unless the number is 1: `1 stage`, `2 stages`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not YAML, or not text.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error


def missing_extra(error: ImportError) -> str | None:
    """How to install a package whose import failed; None if no extra of tpcompress contains it."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:  # transformers names the packages of a processor in the text alone
        named = [name for name, extra in EXTRAS.items() if extra == "media" and name in str(error).lower()]
        package = next((name for name in named if find_spec(name) is None), "")
    if not package:
        return None
    return f"{package} is not installed; install it with: {install_command([package])}."


def install_command(packages: Iterable[str]) -> str:
    """The command that installs packages: by the extras of tpcompress that contain them, others by name."""
    names = list(packages)
    extras = sorted({EXTRAS[name] for name in names if name in EXTRAS})
    others = [name for name in names if name not in EXTRAS]
    return " ".join(["pip install", *([f"'tpcompress[{','.join(extras)}]'"] if extras else []), *others])
