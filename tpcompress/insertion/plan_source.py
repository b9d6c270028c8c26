"""Reads the text forms of a plan into plain values: short form, pruner name, plan file, recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from tpcompress.bundled import find_config
from tpcompress.errors import did_you_mean
from tpcompress.pruners import list_pruners
from tpcompress.pruners.catalogue import paper_plans
from tpcompress.recipe_files import read_recipe

SHORT_STAGE = re.compile(r"\s*(?P<pruner>[\w.]+):(?P<keep>\d+/\d+|\d+|\d*\.\d+)(?:@(?P<layer>\d+))?\s*")
"""One stage of the short form: `dart:64@2`, or `dart:1/4` or `dart:0.25` for a ratio at layer 0."""

PAPER = re.compile(r"\s*(?P<name>\w+):paper\s*")
"""A plan with the settings of a paper, by the name of its pruner: `dart:paper`."""

MOVED = {"merged_divprune": "merged", "restore_divprune": "restore", "window_fastv": "window"}
"""Files that `recipes/free/` held under other names than those of their plans today."""

FORMS = "give a pruner with a budget, PRUNER:KEEP@LAYER such as divprune:64@0, a mapping, a plan file or a recipe"


def read_source(source: str | Path) -> list[dict[str, Any]] | Mapping[str, Any] | str:
    """Read a plan that is given as text or as a path.

    Args:
        source: a short form (`divprune:64@0,dart:0.25@8`), a pruner's name with the settings of its paper
            (`dart:paper`), the path of a plan file or recipe, or a pruner's name.

    Returns:
        The stages of a short form, the mapping in a file, or the name of a pruner.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed short form, a pruner without a paper plan, a file that is not YAML, or a recipe without
            a plan.
    """
    text = str(source)
    if paper := PAPER.fullmatch(text):
        return _paper_plan(paper["name"])
    matches = [SHORT_STAGE.fullmatch(part) for part in text.split(",")]
    if all(matches):
        return [_short_stage(match) for match in matches if match]
    if text in list_pruners():
        return text
    looks_like_path = (
        isinstance(source, Path) or ("/" in text and ":" not in text) or text.endswith((".yaml", ".yml", ".json"))
    )
    if looks_like_path or Path(text).is_file():
        return _read_file(text)
    if ":" in text or "," in text:
        raise ValueError(f"'{text}' is not a plan; write PRUNER:KEEP@LAYER such as divprune:64@0,dart:0.25@8.")
    return text


def _short_stage(match: re.Match[str]) -> dict[str, Any]:
    return {"pruner": match["pruner"], "layer": int(match["layer"] or 0), **read_keep(match["keep"])}


def read_keep(keep: str) -> dict[str, Any]:
    """A budget as text (`64`, `0.25`, `1/9`), as the field of a stage that it sets.

    Raises:
        ValueError: another text.
    """
    try:
        if "/" in keep or "." in keep:
            return {"keep_ratio": float(Fraction(keep))}
        return {"keep_tokens": int(keep)}
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{keep}' is not a budget; write tokens (64), a fraction (1/9) or a ratio (0.11).") from None


def _paper_plan(name: str) -> Mapping[str, Any]:
    plans = paper_plans()
    if name not in plans:
        raise ValueError(
            f"No plan '{name}:paper'; plans of papers: {', '.join(plans)}.{did_you_mean(name, plans)} Other pruners "
            f"need a budget: {name}:64@0."
        )
    values: Mapping[str, Any] = yaml.safe_load(plans[name])
    return values


def _read_file(path: str) -> Mapping[str, Any]:
    """The plan of a plan file or of a recipe, as plain values."""
    name = MOVED.get(Path(path).stem, Path(path).stem)
    if Path(path).parent.name == "free" and not Path(path).is_file() and name in paper_plans():
        return _paper_plan(name)  # where plans of papers were files: recipes/free/dart.yaml
    try:
        found = find_config(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"No plan at {path}; {FORMS}.") from None
    values = read_recipe(found)
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
