"""Every (class, way) is covered by the tests that run by default."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest
from forked import forked
from structure import PREFERRED, READ, Structure, first_variants, representatives, structure
from support import case_id, model_cases, tiny_model
from ways import Way, declared

from tpcompress.families import Family, resolve

ROOT = Path(__file__).parents[2]
GENERATED = (("input", "original"), ("inside", "compact"), ("merging", "compact"))
CONTINUED = (("input", "original"), ("inside", "compact"), ("several", "compact"))
REQUIRED = {
    *(Way(plan, "original", "drop", "forward") for plan in ("input", "several", "merging")),
    *(Way("several", "compact", mode, "forward") for mode in ("drop", "mask")),
    Way("merging", "original", "mask", "forward"),
    *(Way(*p, mode, call) for p in GENERATED for mode in ("drop", "mask") for call in ("prefill", "decoding")),
    *(Way(*p, "drop", "static decoding") for p in GENERATED),
    *(Way(*p, "drop", "continuing") for p in CONTINUED),
    *(Way(plan, "original", "drop", "training") for plan in ("several", "merging")),
    Way("learned", "original", "mask", "training"),
    Way("learned", "original", "drop", "decoding"),
}
"""What every class is tested with. Where tokens cannot be hidden, mode `mask` is for learned gates alone."""

NOT_STRUCTURE = {"name", "layouts", "tower", "tokens_per_image", "patches_per_token", "one_size"}
"""Fields of `Family` that insertion reads and that every family's own tests cover."""


class Collected:
    """Writes function, class and declared ways of every collected test of a family into a file."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        found = []
        for item in session.items:
            case = getattr(item, "callspec", None) and item.callspec.params.get("subject")
            if case:
                found.append([item.originalname, case, [list(way) for way in declared(item, structure(case))]])
        self.out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def default_tests(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Structure, set[Way]]]:
    """Function, class and declared ways of every test of the matrix that runs by default."""
    folder = tmp_path_factory.mktemp("collected")
    command = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "tests/matrix")]
    code, said = forked(lambda: pytest.main(command, [Collected(folder / "items.json")]), folder / "said.txt")
    assert code == 0, said
    items = json.loads((folder / "items.json").read_text())
    return [(name, structure((case[0], tuple(case[1]))), {Way(*way) for way in ways}) for name, case, ways in items]


def test_every_way_of_every_class_is_covered(default_tests: list[tuple[str, Structure, set[Way]]]) -> None:
    covered: dict[Structure, set[Way]] = defaultdict(set)
    for _, kind, ways in default_tests:
        covered[kind] |= ways
    for kind, case in representatives().items():
        required = {way for way in REQUIRED if kind.hides or way.mode != "mask" or way.plan == "learned"}
        assert not required - covered[kind], f"{case_id(case)} has no default test of {required - covered[kind]}"


def test_no_test_leaves_out_a_class(default_tests: list[tuple[str, Structure, set[Way]]]) -> None:
    """Whatever runs on one class runs on all, apart from the files that name their variants."""
    chosen = {
        "test_answers.py",
        "test_compile.py",
        "test_effect.py",
        "test_gates.py",
        "test_pruners.py",
        "test_tiles.py",
    }
    named = {
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name in chosen
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    classes: dict[str, set[Structure]] = defaultdict(set)
    for name, kind, _ in default_tests:
        classes[name].add(kind)
    assert len(classes) > 40
    for name, kinds in classes.items():
        missing = [case_id(case) for kind, case in representatives().items() if kind not in kinds]
        assert name in named or not missing, f"{name} does not run on {missing}"


def test_every_family_equals_the_reference(default_tests: list[tuple[str, Structure, set[Way]]]) -> None:
    """Families that stand for no class, too: one forward call, one generation and one export."""
    assert len(first_variants()) == len({name for name, _ in first_variants()})
    for name in ("test_equals_the_reference", "test_cached_equals_recomputed", "test_round_trip"):
        assert sum(found == name for found, *_ in default_tests) >= len(first_variants())


def test_the_class_holds_what_insertion_reads() -> None:
    """A new field of `Family` that insertion branches on must become part of the class."""
    names = {field.name for field in fields(Family)} | {"layouts"}
    read = {
        node.attr
        for path in (ROOT / "tpcompress/insertion").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and (ends_in_family(node.value) or node.attr == "family")
    } & names
    assert read, "control: insertion reads families"
    assert read <= set(READ) | NOT_STRUCTURE, "add it to tests/structure.py"
    assert set(READ.values()) <= {field.name for field in fields(Structure)}


def ends_in_family(node: ast.expr) -> bool:
    """Whether an expression is `family` or `....family`."""
    return (
        isinstance(node, ast.Attribute | ast.Name)
        and (getattr(node, "attr", None) or getattr(node, "id", "")) == "family"
    )


@pytest.mark.parametrize("case", representatives().values(), ids=case_id)
def test_the_class_is_that_of_the_model(case: tuple[str, tuple]) -> None:
    parts = resolve(tiny_model(case[0], *case[1]))
    assert structure(case).deepstack == hasattr(parts.language_model, "_deepstack_process")
    assert structure(case).shares_keys == (parts.stage_layers != list(range(len(parts.layers))))


def test_preferred_variants_stand_for_a_class_each() -> None:
    assert set(PREFERRED) <= {case_id(case) for case in representatives().values()}
    assert {structure(case) for case in model_cases()} == set(representatives())
