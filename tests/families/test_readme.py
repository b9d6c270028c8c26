"""What the README says about families is what the registry knows."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import tpcompress
from tpcompress.families import Family, list_families

PACKAGE = Path(tpcompress.__file__).parent
README = (PACKAGE.parent / "README.md").read_text()
SECTION = README.partition("## A new model family")[2].partition("\n## ")[0]


def test_it_lists_every_family() -> None:
    found = re.search(r"Here: the families (`.*?`) \(", README, flags=re.S)
    assert found
    assert re.findall(r"`(\w+)`", found.group(1)) == list(list_families())


def test_the_literal_is_the_real_one() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.S)
    assert code in (PACKAGE / "families" / "llava.py").read_text()


def test_it_explains_every_field() -> None:
    cells = [line.split("|")[1] for line in SECTION.splitlines() if line.startswith("| `")]
    explained = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    known = {field.name for field in fields(Family)}
    assert explained <= known
    assert known - explained == {"core", "language_model", "layers", "final_norm"}, (
        "those are explained beside the other paths"
    )


def test_the_tree_names_every_file_of_the_insertion() -> None:
    tree = README.partition("## Files")[2].partition("```\n")[2].partition("```")[0]
    part = tree.partition("  insertion/")[2].partition("  data/")[0]
    files = {path.name for path in (PACKAGE / "insertion").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", part)) == files
