"""The documentation site: every page is generated, the site is built without network, and every link resolves."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from docs_site import build as site_build
from docs_site.docstrings import parse
from docs_site.kinds import KINDS
from docs_site.links import broken_links
from docs_site.pages import all_pages, navigation
from docs_site.recipes import RECIPES
from docs_site.reference import signature

import tpcompress as tp
from tpcompress.cli.commands import COMMANDS
from tpcompress.families import Family

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return all_pages()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_build.build(tmp_path_factory.mktemp("docs") / "docs")


def test_every_member_of_every_kind_has_a_page(pages: dict[str, str]) -> None:
    for kind in KINDS:
        members = kind.members()
        assert members
        for name, member in members.items():
            page = pages[f"reference/{kind.many}/{name}.md"]
            assert f"`{kind.folder}/" in page
            assert f"({name}.md)" in pages[f"reference/{kind.many}/index.md"]
            if isinstance(member, type):
                arguments = set(re.findall(r"^\| `(\w+)` \| `", page, flags=re.M))
                assert set(signature(member)) <= arguments
    inside = [name for name in pages if name.startswith("reference/recipes/")]
    assert len(inside) == len(RECIPES) + 1


def test_every_command_and_public_name_is_documented(pages: dict[str, str]) -> None:
    assert set(re.findall(r"^### ([\w-]+)$", pages["reference/commands.md"], flags=re.M)) == set(COMMANDS)
    assert set(re.findall(r"^### tp\.(\w+)$", pages["reference/python.md"], flags=re.M)) == set(tp.__all__)


def test_every_kind_has_a_guide_with_a_file(pages: dict[str, str]) -> None:
    for kind in KINDS:
        guide = pages[f"adding/{kind.one}.md"]
        assert re.search(rf"Write `{kind.folder}/\w+\.py`; nothing else is edited", guide), kind.one


def test_the_guide_of_families_has_every_field(pages: dict[str, str]) -> None:
    listed = re.findall(r"^\| `(\w+)` \|", pages["adding/family.md"], flags=re.M)
    assert sorted(listed) == sorted(field.name for field in fields(Family))


def test_every_page_is_in_the_navigation(pages: dict[str, str]) -> None:
    listed = re.findall(r"'([\w/-]+\.md)'", str(navigation(pages)))
    assert sorted(listed) == sorted(pages)


def test_the_site_is_built_and_every_link_resolves(site: Path, pages: dict[str, str]) -> None:
    assert len(list(site.rglob("*.html"))) == len(pages) + 1  # and the page for addresses that do not exist


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('<a href="missing.html">x</a>', "no such file"),
        ('<a href="train.html#missing">x</a>', "no such anchor"),
        ('<a href="#missing">x</a>', "no such anchor"),
        ('<img src="images/missing.png">', "no such file"),
        ('<script src="https://cdn.example.org/x.js"></script>', "loaded from another host"),
    ],
)
def test_a_broken_link_is_found(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "train.html").write_text('<h1 id="train">Train</h1>')
    (tmp_path / "index.html").write_text('<a href="train.html#train">x</a> <a href="https://example.org">y</a>')
    assert broken_links(tmp_path) == []
    (tmp_path / "index.html").write_text(line)
    (found,) = broken_links(tmp_path)
    assert reason in found


def test_a_docstring_becomes_markdown() -> None:
    parsed = parse(
        "score(v) = a * b_v.     Cost: one sort.\nPaper: 64 tokens.\n\n    m = f(s)\n\nModes:\n    hard    a cut\n"
        "    soft    a gate\n            of weights\n\nArgs:\n    alpha: weight\n        of a term\n    beta: x\n"
    )
    assert parsed.sections == {"Args": {"alpha": "weight of a term", "beta": "x"}}
    assert "score(v) = a \\* b\\_v." in parsed.body
    assert "**Cost:** one sort." in parsed.body
    assert "**Paper:** 64 tokens." in parsed.body
    assert "```text\nm = f(s)\n```" in parsed.body
    assert "| `soft` | a gate of weights |" in parsed.body
