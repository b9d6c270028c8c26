"""`tpcompress families`: everything the registry knows, in a table that fits, and one family in full."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

import tpcompress
from tpcompress.cli import look_up
from tpcompress.cli import main as cli
from tpcompress.families import Family, list_families
from tpcompress.families.catalogue import (
    COLUMNS,
    about,
    attribute_docs,
    by_reason,
    describe,
    facts,
    field_docs,
    find,
    in_full,
    markdown_table,
    refusals,
)
from tpcompress.families.refused import REFUSED

FOLDER = Path(tpcompress.__file__).parent / "families"
families = pytest.mark.parametrize("name", list_families())


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of 100 columns that remembers."""
    console = Console(width=100, record=True, quiet=False)
    monkeypatch.setattr(look_up, "console", console)
    return console


def test_the_table_shows_every_family_and_type(wide: Console) -> None:
    assert cli.main(["families"]) == 0
    lines = wide.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    words = " ".join(" ".join(lines).split())
    assert "…" not in words, "nothing is cut off"
    for name, family in list_families().items():
        (line,) = [line for line in lines if line.startswith(f" {name} ")]
        assert line.split()[1] == family.model_types[0]
        assert all(limit in words for limit in family.limits)
        assert all(f" {kind} " in words for kind in family.model_types)
    assert all(name in words and reason in words for name, reason in REFUSED.items())


@families
def test_one_family_in_full(name: str, wide: Console) -> None:
    family = list_families()[name]
    module = sys.modules[family.tiny.config.__module__]
    assert family in vars(module).values(), "its tiny config stands in its own file"
    assert cli.main(["families", name]) == 0
    shown = " ".join(wide.export_text().split())
    assert " ".join(about(family).split()) in shown
    assert family.layers in shown
    assert tuple(facts(family)) == COLUMNS
    assert all(what in shown for what in in_full(family))


def test_facts_follow_from_the_description() -> None:
    known = list_families()
    assert facts(known["qwen3_vl"]) == {
        "fit": "yes", "batch": "yes", "images": "any size", "video": "yes", "tower": "yes", "install": "torchvision",
    }  # fmt: skip
    assert facts(known["paligemma"])["fit"] == "one question"
    assert facts(known["got_ocr2"])["fit"] == "one image"
    assert facts(known["glm4v"])["batch"] == "one kind"
    assert facts(known["smolvlm"])["video"] == "as images"
    assert facts(known["llava"])["video"] == facts(known["llava"])["install"] == "-"
    assert in_full(known["gemma4"])["stages"].startswith("before the language model, and before layers from which")
    assert in_full(known["qwen3_vl"])["positions"].endswith("(M-RoPE)")
    assert in_full(known["got_ocr2"])["training rows"] == "with one image each, and none without an image"
    assert "in sliding_attention layers" in in_full(known["gemma4"])["attention"]
    assert in_full(known["llava"])["images"] == "one size"


def test_names_types_and_what_is_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert find("qwen3_vl_moe") is find("qwen3_vl") is list_families()["qwen3_vl"]
    with pytest.raises(ValueError, match="^mllama cannot be pruned: .* cross-attention"):
        find("mllama")
    assert cli.main(["families", "qwen3_vl_mo"]) == 2
    assert "No family or model type 'qwen3_vl_mo'" in capsys.readouterr().err


def test_names_of_one_reason_stand_together() -> None:
    assert by_reason([("a", "x"), ("b", "y"), ("c", "x")]) == {"x": ["a", "c"], "y": ["b"]}


@families
def test_a_description_has_all_that_a_page_needs(name: str) -> None:
    family = list_families()[name]
    found = describe(family)
    assert (FOLDER / found.file).is_file()
    assert f'name="{name}"' in (FOLDER / found.file).read_text()
    assert found.text.startswith(found.summary)
    assert (found.model_types, found.limits) == (family.model_types, family.limits)
    assert (found.facts, found.details) == (facts(family), in_full(family))


def test_every_field_is_documented_with_its_default() -> None:
    found = {field.name: field for field in field_docs()}
    assert list(found) == [field.name for field in fields(Family)]
    assert all(field.text for field in found.values())
    assert set(attribute_docs(Family)) == set(found), "the docstring documents no other field"
    assert found["name"].default is None
    assert found["positions"].default == "'1d'"
    assert found["keys_of"].default == "own_keys"
    assert found["vision_tower"].text == found["projector"].text
    assert found["splits_tiles"].text.endswith("holds all images of a sample.")


def test_every_refused_type_is_listed_once() -> None:
    listed = [name for names in refusals().values() for name in names]
    assert sorted(listed) == sorted(REFUSED)


def test_the_markdown_table_is_that_of_the_facts() -> None:
    head, line, *rows = markdown_table().splitlines()
    assert head == f"| family | {' | '.join(COLUMNS)} |"
    assert line.count("---") == len(COLUMNS) + 1
    assert len(rows) == len(list_families())
    for row, (name, family) in zip(rows, list_families().items(), strict=True):
        assert [cell.strip() for cell in row.strip("|").split("|")] == [f"`{name}`", *facts(family).values()]
