"""What a reader may want to know of the families, read from their descriptions; no model is built."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable

from tpcompress.errors import did_you_mean
from tpcompress.families.base import Family, list_families, own_keys
from tpcompress.families.refused import check_not_refused

COLUMNS = ("positions", "images", "video", "both ways", "stages", "tower")
"""The entries of `facts`."""


def facts(family: Family) -> dict[str, str]:
    """What a family can do, a word or two each: a row of the table of all families."""
    return {
        "positions": "M-RoPE" if family.positions == "mrope" else "1d",
        "images": "any size" if "wide" in family.tiny.kinds else "one size",
        "video": "yes" if family.video_layouts is not None else "-",
        "both ways": "yes" if family.blocks is not None else "-",
        "stages": "all layers" if family.keys_of is own_keys else "some layers",
        "tower": "yes" if family.tower is not None else "-",
    }


def in_full(family: Family) -> dict[str, str]:
    """The same in sentences, with model types and paths."""
    found = facts(family)
    videos = "frames are rectangles of one video" if family.video_layouts else "none; frames may come as images"
    both_ways = "causal"
    if family.blocks is not None:
        both_ways = f"blocks of tokens see each other both ways, in {' and '.join(family.blocks.kinds)} layers"
    stages = "before the language model and before every decoder layer"
    if family.keys_of is not own_keys:
        stages = "before the language model and before layers behind which no layer reads the keys of an earlier one"
    return {
        "model types": ", ".join(family.model_types),
        "vision tower": family.vision_tower,
        "projector": family.projector,
        "language model": family.language_model,
        "decoder layers": family.layers,
        "positions": "time, height and width (M-RoPE)" if found["positions"] == "M-RoPE" else "one per token",
        "images": "of several sizes, as a whole or in tiles" if found["images"] == "any size" else "of one size",
        "video": videos,
        "attention": both_ways,
        "stages": stages,
        "tower": "shows its layers' attention, keys and features" if family.tower is not None else "shows nothing",
    }


def about(family: Family) -> str:
    """The docstring of the file that describes a family, one line per paragraph."""
    text = inspect.getdoc(sys.modules[family.tiny.config.__module__]) or ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def by_reason(reasons: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Pairs of name and reason as the names of each reason."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons:
        found.setdefault(reason, []).append(name)
    return found


def find(name: str) -> Family:
    """A family by its name or by a model type.

    Raises:
        ValueError: there is none; with the reason if the type is refused, else with the nearest name.
    """
    known = {t: family for family in list_families().values() for t in family.model_types} | list_families()
    if name in known:
        return known[name]
    check_not_refused(name)
    hint = did_you_mean(name, known)
    raise ValueError(f"No family or model type '{name}'; `tpcompress families` lists them.{hint}")
