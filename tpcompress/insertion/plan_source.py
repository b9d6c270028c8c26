"""Reads the text forms of a plan into plain values: short form, pruner name, plan file, recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcompress.bundled import find_config
from tpcompress.errors import read_yaml
from tpcompress.pruners import list_pruners

SHORT_STAGE = re.compile(r"\s*(?P<pruner>[\w.]+):(?P<keep>\d+|\d*\.\d+)(?:@(?P<layer>\d+))?\s*")
"""One stage of the short form: `dart:64@2`, or `dart:0.25` for a ratio at layer 0."""

FORMS = "give a pruner with a budget, PRUNER:KEEP@LAYER such as divprune:64@0, a mapping, a plan file or a recipe"


def read_source(source: str | Path) -> list[dict[str, Any]] | Mapping[str, Any] | str:
    """Read a plan that is given as text or as a path.

    Args:
        source: a short form (`divprune:64@0,dart:0.25@8`), the path of a plan file or recipe, or a pruner's name.

    Returns:
        The stages of a short form, the mapping in a file, or the name of a pruner.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed short form, a file that is not YAML, or a recipe without a plan.
    """
    text = str(source)
    matches = [SHORT_STAGE.fullmatch(part) for part in text.split(",")]
    if all(matches):
        return [_short_stage(match) for match in matches if match]
    if text in list_pruners():
        return text
    looks_like_path = isinstance(source, Path) or "/" in text or text.endswith((".yaml", ".yml", ".json"))
    if looks_like_path or Path(text).is_file():
        return _read_file(text)
    if ":" in text or "," in text:
        raise ValueError(f"'{text}' is not a plan; write PRUNER:KEEP@LAYER such as divprune:64@0,dart:0.25@8.")
    return text


def _short_stage(match: re.Match[str]) -> dict[str, Any]:
    keep = match["keep"]
    budget = {"keep_ratio": float(keep)} if "." in keep else {"keep_tokens": int(keep)}
    return {"pruner": match["pruner"], "layer": int(match["layer"] or 0), **budget}


def _read_file(path: str) -> Mapping[str, Any]:
    """The plan of a plan file or of a recipe, as plain values."""
    try:
        found = find_config(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"No plan at {path}; {FORMS}.") from None
    values = read_yaml(found)
    if isinstance(values, Mapping) and "model" in values:
        values = (values["model"] or {}).get("plan")
        if values is None:
            raise ValueError(f"The recipe {path} has no model.plan: it trains the dense model.")
        if isinstance(values, str):
            values = read_source(values)
    if isinstance(values, list):
        values = {"stages": values}
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds no plan; a plan is a mapping with `stages`, or with `pruner` and a budget.")
    return values
