"""A module of the package as definitions: which lines define a name, and which names of other modules they use."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tpcompress.export.remote_code.left_out import KEYWORDS, MEMBERS

PACKAGE = "tpcompress"
ROOT = Path(__file__).parents[2]
"""Folder of the package."""
WITHOUT_EFFECT = {"cache", "contextmanager", "dataclass"}
"""Decorators that register nothing, so that an unused function with them is left out."""

Located = ast.stmt | ast.expr | ast.keyword
"""Nodes that know where they stand."""
Edit = tuple[int, int, bytes]
"""Start and end in the bytes of a file, and what stands there instead."""


@dataclass(frozen=True)
class Binding:
    """What an imported name stands for: a module (`name` is None), or a name of a module."""

    module: str
    name: str | None

    @property
    def ours(self) -> bool:
        """Whether it is a module of this package, or in one."""
        return self.module.partition(".")[0] == PACKAGE


@dataclass
class Definition:
    """Consecutive lines of a module that define names, or that have an effect when the module is imported.

    Attributes:
        start: first byte, with the comment above.
        end: byte after the last one, with the docstring below.
        uses: names that it refers to, at any depth.
        members: (name, attribute) pairs that it refers to, for names of modules.
        imports: imports inside of it, with the bytes of their statement.
        edits: bytes that are left out.
    """

    start: int
    end: int
    uses: set[str] = field(default_factory=set)
    members: set[tuple[str, str]] = field(default_factory=set)
    imports: list[tuple[ast.Import | ast.ImportFrom, int, int]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)


@dataclass
class Module:
    """One file of the package.

    Attributes:
        name: dotted name.
        path: relative to the folder that holds the package.
        text: its bytes.
        doc: its docstring, with quotes.
        bindings: imported names.
        definitions: definitions by name.
        effects: definitions that run when the module is imported, whether they are used or not.
    """

    name: str
    path: str
    text: bytes
    doc: bytes = b""
    bindings: dict[str, Binding] = field(default_factory=dict)
    definitions: dict[str, Definition] = field(default_factory=dict)
    effects: list[Definition] = field(default_factory=list)


def file_of(name: str) -> Path | None:
    """The file of a module of the package; None if there is no such module."""
    path = ROOT.parent.joinpath(*name.split("."))
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return found if found.is_file() else None


@cache
def read_module(name: str) -> Module:
    """Parse a module of the package."""
    path = file_of(name)
    assert path is not None, name
    return parse(name, path.relative_to(ROOT.parent).as_posix(), path.read_bytes())


def parse(name: str, path: str, text: bytes) -> Module:
    """Parse the text of a module."""
    tree, found = ast.parse(text), Module(name, path, text)
    at = _Offsets(text)
    body = list(tree.body)
    if body and _is_text(body[0]):
        found.doc = text[slice(*at.of(body[0]))]
        body = body[1:]
    last: Definition | None = None
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.bindings |= dict(bindings_of(node, name))
            last = None
        elif _is_text(node) and last is not None:
            last.end = at.of(node)[1]
        elif not _is_type_checking(node):
            names = list(_defined(node))
            if names == ["__all__"]:
                continue
            last = _definition(node, at, name)
            found.definitions |= dict.fromkeys(names, last)
            if not names or _registers(node):
                found.effects.append(last)
    return found


def bindings_of(node: ast.Import | ast.ImportFrom, module: str) -> Iterator[tuple[str, Binding]]:
    """The names that an import binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (
                (alias.asname or alias.name.partition(".")[0]),
                Binding(alias.name if alias.asname else alias.name.partition(".")[0], None),
            )
        return
    assert node.level == 0 and node.module is not None, f"{module} has a relative import"
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        is_module = inner.startswith(f"{PACKAGE}.") and file_of(inner) is not None
        yield alias.asname or alias.name, Binding(inner, None) if is_module else Binding(node.module, alias.name)


class _Offsets:
    """Bytes of nodes in a file."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.lines = [0]
        for line in text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def of(self, node: Located) -> tuple[int, int]:
        """First byte of a node, and the byte after its last; with decorators."""
        decorators: list[ast.expr] = getattr(node, "decorator_list", [])
        first = min([node, *decorators], key=lambda n: n.lineno)
        column = first.col_offset - (1 if first is not node else 0)  # the @ before a decorator
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[first.lineno - 1] + column, self.lines[node.end_lineno - 1] + node.end_col_offset

    def comments_above(self, start: int) -> int:
        """Where the comment lines begin that stand right above; rulers between sections do not count."""
        while start > 0:
            previous = self.text.rfind(b"\n", 0, start - 1) + 1
            line = self.text[previous : start - 1]
            if not line.startswith(b"#") or line.startswith(b"# -----"):
                break
            start = previous
        return start

    def whole_lines(self, start: int, end: int) -> tuple[int, int]:
        """The same with the indentation before and the line end after."""
        start = self.text.rfind(b"\n", 0, start) + 1
        newline = self.text.find(b"\n", end)
        return start, len(self.text) if newline < 0 else newline + 1


def _definition(node: ast.stmt, at: _Offsets, module: str) -> Definition:
    start, end = at.of(node)
    if at.text[end : end + 40].split(b"\n", 1)[0].lstrip().startswith(b"# fmt"):
        end = at.text.index(b"\n", end)
    found = Definition(at.comments_above(start), end)
    _walk(node, found, at, module)
    return found


def _walk(node: ast.AST, found: Definition, at: _Offsets, module: str) -> None:
    """Collect what a node refers to, without the members and arguments that are left out."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        found.imports.append((node, *at.of(node)))
        return
    if isinstance(node, ast.Name):
        found.uses.add(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        found.members.add((node.value.id, node.attr))
    left_out = MEMBERS.get(module, ())
    dropped: set[int] = set()
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if any(f"{node.name}.{name}" in left_out for name in _defined(child)):
                dropped.add(id(child))
                found.edits.append((*at.whole_lines(*at.of(child)), b""))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for keyword in node.keywords:
            if node.func.id in KEYWORDS.get(keyword.arg or "", ()):
                dropped.add(id(keyword))
                found.edits.append((*_argument(at, keyword), b""))
    for inner in ast.iter_child_nodes(node):
        if id(inner) not in dropped:
            _walk(inner, found, at, module)


def _argument(at: _Offsets, node: ast.keyword) -> tuple[int, int]:
    """Bytes of an argument with the comma after it, and with its lines if it stands alone on them."""
    start, end = at.of(node)
    if at.text[end : end + 1] == b",":
        end += 1
    first, last = at.whole_lines(start, end)
    alone = not at.text[first:start].strip() and not at.text[end:last].strip()
    return (first, last) if alone else (start, end)


def _defined(node: ast.AST) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def _registers(node: ast.stmt) -> bool:
    """Whether a function or class has a decorator that may register it."""
    for decorator in getattr(node, "decorator_list", ()):
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if not isinstance(called, ast.Name) or called.id not in WITHOUT_EFFECT:
            return True
    return False


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
