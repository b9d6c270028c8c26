"""Reference pages of recipes, and which recipes name a member of a kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from docs_site.docstrings import HIDE_CONTENTS, cell, escape, table
from docs_site.kinds import Kind

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def recipe_kind(path: Path, values: dict[str, Any]) -> str:
    """What a recipe file is for, from its folder and keys."""
    if path.parent.name == "shared":
        return "shared"
    if path.stem == "benchmarks":
        return "benchmarks"
    if "stages" in values:
        return "plan"
    if "contenders" in values:
        return "study"
    if "estimators" in values:
        return "estimators"
    if "model" in values:
        return "run"
    return "overlay" if "trainer" in values else "comparison"


MEANINGS = {
    "run": "complete run, for `tpcompress fit`",
    "overlay": "overlay, given after another recipe",
    "shared": "settings that recipes include",
    "benchmarks": "table of benchmarks, which `tpcompress compare` reads",
    "plan": "plan without training",
    "comparison": "comparison, for `tpcompress compare`",
    "study": "grid of runs, for `tpcompress study`",
    "estimators": "grid of gradient estimators, for `tpcompress estimators`",
}

FOLDERS = {
    "tiny_llava": "The bundled base, on CPU",
    "photo_llava": "Photographs on a real encoder, on CPU (built by `scripts/build_photos.py`)",
    "llava15_7b": "LLaVA-1.5-7B",
    "qwen2_5_vl": "Qwen2.5-VL-7B",
    "qwen3_vl": "Qwen3-VL-8B",
    "internvl3": "InternVL3-8B",
    "smolvlm2": "SmolVLM2-2.2B",
    "llava_onevision": "LLaVA-OneVision-7B",
    "gemma3": "Gemma-3-4B",
    "gpus": "Several GPUs",
    "shared": "Shared settings, which recipes include",
    "presets": "Published training methods (see [presets](../../notes/presets.md))",
    "own_loop": "Your own training loop",
    "eval": "Benchmarks with lmms-eval (see [benchmarks](../../notes/eval.md))",
    "studies": "Studies (see [the study](../../notes/studies.md))",
}
"""Headings of the index of recipes, by folder."""


def recipe_page(path: str) -> str:
    """The page of a recipe file."""
    return f"reference/recipes/{file_name(path)}"


def file_name(path: str) -> str:
    """File name of the page of a recipe."""
    return path.removeprefix("recipes/").replace("/", "-").removesuffix(".yaml") + ".md"


def _header(text: str) -> list[str]:
    """Comment lines before the first key."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def pages() -> Iterator[tuple[str, str]]:
    index = [HIDE_CONTENTS, "# Recipes\n"]
    listed: dict[str, list[list[str]]] = {}
    for path in RECIPES:
        text, name = path.read_text(), str(path.relative_to(ROOT))
        what, header = recipe_kind(path, yaml.safe_load(text)), _header(text)
        prose = " ".join(line for line in header if not line.startswith("tpcompress "))
        commands = [re.split(r"\s{2,}", line)[0] for line in header if line.startswith("tpcompress ")]
        if what == "plan":
            commands = [f"tpcompress export --base BASE --plan {name} --out DIR"]
        page = [f"# {path.parent.name}/{path.stem}\n", f"*Recipe* · `{name}` · {MEANINGS[what]}\n", escape(prose), ""]
        page += ["```bash", *commands, "```", ""] if commands else []
        page += ["```yaml", text.rstrip(), "```"]
        yield recipe_page(name), "\n".join(page) + "\n"
        first = prose.partition(". ")[0].rstrip(".") + "."
        listed.setdefault(path.parent.name, []).append([f"[`{path.stem}`]({file_name(name)})", what, cell(first)])
    for folder, rows in sorted(listed.items(), key=lambda item: list(FOLDERS).index(item[0])):
        index += [
            f"\n## {FOLDERS[folder]}\n",
            f"`recipes/{folder}/`\n",
            table(["Recipe", "Kind", "What it does"], rows),
        ]
    yield "reference/recipes/index.md", "\n".join(index)


def used_in(kind: Kind, name: str) -> list[str]:
    """Recipes in which a member is named, by its own key."""
    return [str(path.relative_to(ROOT)) for path in RECIPES if (kind.one, name) in _names(path)]


_NAMES: dict[Path, set[tuple[str, str]]] = {}


def _names(path: Path) -> set[tuple[str, str]]:
    """(kind, name) of everything that a recipe names."""
    if path not in _NAMES:
        found: set[tuple[str, str]] = set()
        _collect(yaml.safe_load(path.read_text()), found)
        _NAMES[path] = found
    return _NAMES[path]


KEYS = {
    "pruner": "pruner", "importance": "pruner", "uniqueness": "pruner", "scorer": "scorer", "selector": "selector",
    "applier": "applier", "losses": "loss", "teacher": "teacher", "schedule": "schedule", "budget": "schedule",
    "training_free": "pruner", "free": "pruner", "task": "task", "metric": "metric",
}  # fmt: skip
"""Recipe keys whose value names a member of a kind."""


def _collect(values: Any, found: set[tuple[str, str]]) -> None:
    if isinstance(values, list):
        for value in values:
            _collect(value, found)
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            named = (one.get("type") or one.get("class_path")) if isinstance(one, dict) else one
            if key in KEYS and isinstance(named, str):
                found.add((KEYS[key], named))
        _collect(value, found)
