"""Load the base model and its processor from a folder, the hub, or the package."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.utils import is_bitsandbytes_available

from tpcompress.auto_register import PREFIX
from tpcompress.bundled import base_path
from tpcompress.errors import first_line, missing_extra
from tpcompress.families import family_of
from tpcompress.families.packages import missing_line
from tpcompress.hub import offline_if_unreachable, why_absent
from tpcompress.paths import MODEL_HINT, check_model, near_path

DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_base(
    base: str,
    dtype: str = "float32",
    attention: str | None = None,
    quantize: dict[str, Any] | None = None,
    device_map: Any = None,
) -> nn.Module:
    """Load a vision-language model.

    Args:
        base: folder, hub id or bundled name.
        dtype: weight dtype.
        attention: attention implementation; None for the default of transformers.
        quantize: fields of transformers' BitsAndBytesConfig; None disables quantisation.
        device_map: how transformers places the weights; None leaves them on the CPU.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: unknown dtype, no loadable model, an export of tpcompress, or bitsandbytes is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if device_map is not None:
        options["device_map"] = device_map
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize)
    path = model_path(base)
    _check_no_export(path, base)
    return _load(lambda: AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options), "model", base)


def load_processor(base: str) -> Any:
    """Load the processor of a base model.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no loadable processor, or a package that it needs is not installed; with the command to install it.
    """
    path = model_path(base)
    try:
        return _load(lambda: AutoProcessor.from_pretrained(path), "processor", base)
    except ValueError as error:
        if line := _missing_packages(path):
            raise ValueError(f"The processor of '{base}' cannot be loaded: {line}") from error
        raise


def load_config(base: str) -> PretrainedConfig:
    """Load the config of a base model.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no loadable config.
    """
    path = model_path(base)
    config: PretrainedConfig = _load(lambda: AutoConfig.from_pretrained(path), "config", base)
    return config


def _check_no_export(path: str, base: str) -> None:
    """Refuse an export of tpcompress as a base: the pruner inside it would act in what is called dense.

    Raises:
        ValueError: it is one, with the name of its own base.
    """
    config, _ = _load(lambda: PretrainedConfig.get_config_dict(path), "model", base)
    if not str(config.get("model_type")).startswith(PREFIX):
        return
    manifest, known = Path(path) / "manifest.json", None
    if manifest.is_file():
        known = json.loads(manifest.read_text(encoding="utf-8")).get("base", {}).get("model")
    raise ValueError(
        f"'{base}' is an export of tpcompress, which always prunes; a base is a dense model. "
        f"Give the model that it was made from{f' ({known})' if known else ''}."
    )


def max_positions(base: str) -> int | None:
    """Longest sequence that the language model of a base was made for; None if its config gives none.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no loadable config.
    """
    return getattr(load_config(base).get_text_config(), "max_position_embeddings", None)


def _missing_packages(path: str) -> str | None:
    """Which packages the processor of a known family lacks, in one line."""
    try:
        family = family_of(AutoConfig.from_pretrained(path))
    except (OSError, ValueError):  # no config, or no family of ours: the first error stands
        return None
    return missing_line(family)


def _quantization(fields: dict[str, Any]) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise ValueError("quantize requires bitsandbytes, which is not installed; install it, or leave quantize out.")
    known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    unknown = sorted(set(fields) - known)  # transformers only warns about them
    if unknown:
        raise ValueError(f"quantize: no field {', '.join(unknown)}; use the fields of BitsAndBytesConfig.")
    return BitsAndBytesConfig(**fields)


def model_path(base: str) -> str:
    """The folder of a base model, or its hub id if it may be one.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: neither a folder nor a hub id that is cached or can be reached.
    """
    path = str(Path(base_path(base)).expanduser()) if base.startswith("~") else base_path(base)
    if Path(path).is_dir():
        return path
    check_model(base)
    if reason := why_absent(path):
        raise ValueError(f"No model at '{base}': {reason}. Give another base: {MODEL_HINT}{near_path(path)}")
    return path


def _load(load: Callable[[], Any], what: str, base: str) -> Any:
    try:
        with nullcontext() if Path(base_path(base)).expanduser().is_dir() else offline_if_unreachable():
            return load()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        # The hub client, file formats and missing kernels raise unrelated types, most with several lines.
        if isinstance(error, ImportError) and (hint := missing_extra(error)):
            raise ValueError(f"The {what} of '{base}' cannot be loaded: {hint}") from error
        raise ValueError(f"No {what} at '{base}': {first_line(error)}. Give another base: {MODEL_HINT}") from error
