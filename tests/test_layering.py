"""Who may import whom: arrows between packages, no circles, no shortcuts. Lazy and type-checking imports count."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tpcompress"
FRAMEWORKS = {
    "torch", "transformers", "peft", "lightning", "deepspeed", "datasets", "torchmetrics", "jsonargparse",
    "torchvision", "safetensors", "matplotlib", "accelerate", "pytorch_lightning", "huggingface_hub", "lmms_eval",
    "vlmeval",
}  # fmt: skip

LEAVES = {
    "auto_register",
    "bundled",
    "errors",
    "files",
    "hub",
    "inference",
    "models",
    "open_set",
    "paths",
    "recipe_files",
    "version",
}
"""Modules beside the packages, which every package may import."""

MAY_IMPORT = {
    "errors": set(),
    "open_set": {"errors"},
    "version": set(),
    "files": set(),
    "bundled": set(),
    "auto_register": set(),
    "hub": {"huggingface_hub"},
    "paths": {"bundled", "hub"},
    "recipe_files": {"errors", "bundled"},
    "inference": {"torch"},
    "models": {
        "torch", "transformers", "safetensors", "errors", "bundled", "hub", "paths", "auto_register", "families",
    },
    "pruners": {"torch"},
    "families": {"torch", "transformers"},
    "insertion": {"torch", "transformers", "pruners", "families"},
    "data": {"torch", "transformers", "datasets", "matplotlib"},
    "export": {"torch", "transformers", "safetensors", "huggingface_hub", "insertion", "pruners", "families", "peft"},
    "serving": {"torch", "transformers", "export", "insertion", "pruners", "families"},
    "training": {
        "torch", "transformers", "lightning", "peft", "deepspeed", "torchmetrics", "datasets", "jsonargparse",
        "safetensors", "data", "insertion", "export", "pruners", "families",
    },
    "evaluation": {
        "torch", "transformers", "lightning", "datasets", "torchmetrics", "matplotlib", "training", "data", "export",
        "insertion", "pruners", "families",
    },
    "lab": {
        "torch", "transformers", "datasets", "torchmetrics", "evaluation", "training", "data", "export", "insertion",
        "pruners", "families",
    },
    "harness": {
        "torch", "transformers", "lmms_eval", "vlmeval", "evaluation", "data", "export", "insertion", "pruners",
        "families",
    },
    "compress": {"torch", "evaluation", "training", "export", "data", "insertion", "pruners", "families"},
    "cli": {
        "torch", "transformers", "lightning", "datasets", "jsonargparse", "compress", "lab", "evaluation", "training",
        "data", "export", "insertion", "pruners", "families",
    },
}  # fmt: skip
"""Packages of tpcompress and frameworks; the standard library and small libraries are not architecture."""

NEVER_AT_MODULE_LEVEL = {"export": {"peft"}, "harness": {"lmms_eval", "vlmeval"}}
"""Imported inside functions only, so that loading an export stays light and harnesses are optional."""


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name of a file; that of its folder for `__init__.py`."""
    parts = ["tpcompress", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether at module level) of every import; `from a import b` gives both `a` and `a.b`."""
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
            if name.startswith("tpcompress"):
                yield from ((f"{name}.{alias.name}", id(node) in top) for alias in node.names)


def target(name: str) -> str | None:
    """The package, leaf or framework that an import means; None if it is not architecture."""
    parts = name.split(".")
    if parts[0] == "tpcompress":
        return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else None
    return parts[0] if parts[0] in FRAMEWORKS else None


def upward_arrows(path: Path) -> list[str]:
    """Imports of one file that its package may not have."""
    home = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if home not in MAY_IMPORT:
        return []
    allowed = MAY_IMPORT[home] | {home} | (set() if home in LEAVES else LEAVES)
    found = []
    for name, at_module_level in imports(path):
        what = target(name)
        if what is not None and what not in allowed:
            found.append(f"{path.relative_to(ROOT.parent)} imports {name}")
        if at_module_level and what in NEVER_AT_MODULE_LEVEL.get(home, ()):
            found.append(f"{path.relative_to(ROOT.parent)} imports {name} at module level")
    return found


def circle() -> list[str]:
    """One circle of imports among modules, or among folders; empty if there is none."""
    known = {module_of(path): path for path in files()}
    modules: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for imported, _ in imports(path):
            while imported and imported not in known:
                imported = imported.rpartition(".")[0]
            # The package itself is the public interface; what it re-exports lies below it.
            if imported and imported != name and not (name.startswith(f"{imported}.") and is_package(known[imported])):
                modules[name].add(imported)
    folders: dict[str, set[str]] = {}
    for name, imported in modules.items():
        here = room(name, known)
        folders.setdefault(here, set()).update(room(other, known) for other in imported)
        folders[here].discard(here)
    for graph in (modules, folders):
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            return list(error.args[1])
    return []


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def room(name: str, known: dict[str, Path]) -> str:
    """The folder of a module two levels down or deeper (tpcompress.insertion.shorten); else the module itself."""
    parts = name.split(".")
    if len(parts) > 3 or (len(parts) == 3 and is_package(known[name])):
        return ".".join(parts[:3])
    return name


def siblings(path: Path) -> set[str]:
    """Modules of the same folder that a file imports."""
    home = module_of(path).rpartition(".")[0]
    names = (name for name, _ in imports(path) if name.startswith(f"{home}."))
    return {name.removeprefix(f"{home}.").partition(".")[0] for name in names}


def wrong_siblings() -> list[str]:
    """Pruners that import each other, and families that need each other."""
    shared = {"base", "appliers", "selectors", "scorers", "views"}
    registered = {"__init__", "combinators", "registry"}  # they create pruners by name
    helpers = {path.stem for path in (ROOT / "pruners").glob("*.py") if "\n    name = " not in path.read_text()}
    found = [
        f"pruners/{path.name} imports {other}"
        for path in sorted((ROOT / "pruners").glob("*.py"))
        if path.stem not in registered
        for other in sorted(siblings(path) - shared - helpers - {path.stem})
        if (ROOT / "pruners" / f"{other}.py").is_file()
    ]
    graph = {path.stem: siblings(path) - {path.stem} for path in (ROOT / "families").glob("*.py")}
    graph.pop("__init__", None)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        found.append(f"families in a circle: {error.args[1]}")
    return found


def violations() -> list[str]:
    """Everything that is wrong with the tree."""
    arrows = [line for path in files() for line in upward_arrows(path)]
    forked = [path for path in files() if re.search(r"class \w*DecoderLayer", path.read_text())]
    forks = [f"{path} copies a decoder layer" for path in forked]
    looped = circle()
    return arrows + wrong_siblings() + forks + ([f"circle: {' -> '.join(looped)}"] if looped else [])


def test_the_tree() -> None:
    assert violations() == []


@pytest.mark.parametrize(
    "line",
    [
        "import transformers",
        "from tpcompress.insertion import plan",
        "from tpcompress import insertion",
        "from ..insertion.plan import Stage",
        "from .. import training",
        "def f():\n    import lightning.pytorch as pl",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tpcompress.families import Parts",
        "class MyDecoderLayer: pass",
        "from tpcompress.pruners import good",
        "def f():\n    from tpcompress.pruners.good import x",
    ],
)
def test_a_violation_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "tpcompress")
    for folder in ("pruners", "families"):
        (tmp_path / "tpcompress" / folder).mkdir(parents=True)
    good, bad = (tmp_path / "tpcompress" / "pruners" / name for name in ("good.py", "bad.py"))
    good.write_text("import torch\nimport math\nfrom tpcompress.pruners import bad\n")
    bad.write_text("import torch\n")
    assert violations() == []
    bad.write_text(line)
    assert violations() != []
