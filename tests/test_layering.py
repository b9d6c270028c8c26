"""Who may import whom. The arrows are the architecture; this test is what keeps them true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tpcompress"
OURS = ("pruners", "families", "insertion", "data", "training", "export", "evaluation", "cli")
FRAMEWORKS = {
    "torch", "transformers", "peft", "lightning", "deepspeed", "datasets", "torchmetrics", "jsonargparse",
    "torchvision", "safetensors", "matplotlib", "accelerate", "pytorch_lightning", "huggingface_hub",
}  # fmt: skip

MAY_IMPORT = {
    "pruners": {"torch"},
    "families": {"torch", "transformers"},
    "insertion": {"torch", "transformers", "pruners", "families"},
    "data": {"torch", "transformers", "datasets", "matplotlib"},
    "export": {"torch", "transformers", "safetensors", "huggingface_hub", "insertion", "pruners", "families", "peft"},
    "training": {
        "torch", "transformers", "lightning", "peft", "deepspeed", "torchmetrics", "datasets", "jsonargparse",
        "safetensors", "data", "insertion", "export", "pruners", "families",
    },
    "evaluation": {
        "torch", "transformers", "lightning", "datasets", "torchmetrics", "matplotlib", "training", "data", "export",
        "insertion", "pruners", "families",
    },
}  # fmt: skip
"""Of our packages and of the frameworks; the standard library and small libraries are not architecture."""

HELPERS = {"base", "configured", "parts", "topk", "saliency", "greedy", "merge", "appliers", "selectors", "compose"}
"""Modules of `pruners` that pruners share."""


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, is it at module level) of every import, lazy ones and those for types included."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    package = ["tpcompress", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            yield name, id(node) in top
            if re.fullmatch(r"tpcompress(\.\w+)?", name):
                yield from ((f"{name}.{alias.name}", id(node) in top) for alias in node.names)


def target(name: str) -> str | None:
    """The package of ours or the framework that an import means."""
    parts = name.split(".")
    if parts[0] == "tpcompress":
        return parts[1] if len(parts) > 1 and parts[1] in OURS else None
    return parts[0] if parts[0] in FRAMEWORKS else None


def violations(path: Path) -> list[str]:
    place = path.relative_to(ROOT).parts
    home = place[0].removesuffix(".py")
    if home not in MAY_IMPORT:
        return []
    found = []
    for name, top in imports(path):
        what = target(name)
        if what is None or what == home:
            continue
        if what not in MAY_IMPORT[home]:
            found.append(f"{path.relative_to(ROOT.parent)} imports {name}")
        if home == "export" and what == "peft" and top:
            found.append(f"{path.relative_to(ROOT.parent)} imports peft before it needs it")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    assert violations(path) == []


def siblings(path: Path) -> set[str]:
    """Modules of the same folder that a file imports."""
    home = ["tpcompress", path.parent.name]
    return {name.split(".")[2] for name, _ in imports(path) if name.split(".")[:2] == home and name.count(".") > 1}


def test_pruners_do_not_know_each_other() -> None:
    for path in (ROOT / "pruners").glob("*.py"):
        if path.stem not in ("__init__", "compose", "parts", "registry"):  # whose parts are pruners by name
            assert siblings(path) <= HELPERS | {path.stem}, path.name


def test_a_family_builds_on_older_kin_only() -> None:
    """Qwen3-VL may take Qwen2-VL's layouts, but no two families need each other."""
    graph = {path.stem: siblings(path) - {path.stem} for path in (ROOT / "families").glob("*.py")}
    graph.pop("__init__")
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_nobody_imports_the_command_line() -> None:
    for path in files():
        if path.stem not in ("cli", "commands"):
            assert not [n for n, _ in imports(path) if n.startswith(("tpcompress.cli", "tpcompress.commands"))], path


def test_no_model_is_forked() -> None:
    for path in files():
        assert not re.search(r"class \w*DecoderLayer", path.read_text()), path


def test_the_walk_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "pruners").mkdir()
    bad = tmp_path / "pruners" / "bad.py"
    for line in (
        "import transformers",
        "from tpcompress.insertion import plan",
        "from tpcompress import insertion",
        "from ..insertion.plan import Stage",
        "from .. import training",
        "def f():\n    import lightning.pytorch as pl",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tpcompress.families import Parts",
    ):
        bad.write_text(line)
        assert violations(bad), line
    bad.write_text("import torch\nimport math\nfrom tpcompress.pruners.base import Pruner\nfrom .topk import on\n")
    assert violations(bad) == []
