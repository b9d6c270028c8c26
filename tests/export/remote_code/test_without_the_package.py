"""An export loads without tpcompress: same logits, same retained tokens, same answers, and its copy does as well."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from export.remote_code.child import answers
from export.remote_code.folders import CHEAP, Exported, export_tiny, exported, pairs, run_child
from safetensors.torch import load_file, save_file
from support import placed_configs

import tpcompress as tp

WAYS = ("Auto class", "pipeline")


def assert_same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    assert "retained.0" in found
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_same_folder(again: Path, first: Path) -> None:
    """Weights, config and code are those of the export, byte by byte."""
    code = {path.name for path in first.glob("*.py")}
    assert len(code) > 20
    assert {path.name for path in again.glob("*.py")} == code
    weights = {path.name for path in first.glob("*.safetensors")}
    assert weights == {"tpcompress.safetensors"}
    for name in sorted(code | weights | {"config.json"}):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


def run(
    cases: list[tuple[str, str]], where: Path, ways: Sequence[str], isolated: bool = False
) -> tuple[list[Exported], list[Path]]:
    """Load exports without tpcompress and compare answers and copies; returns the exports and the copies."""
    folders = [exported(*case) for case in cases]
    found, again, errors = run_child([(e.folder, e.inputs) for e in folders], where, ways, isolated=isolated)
    assert errors == {}
    for each, answer, copy in zip(folders, found, again, strict=True):
        assert_same(answer, each.expected)
        assert_same_folder(copy, each.folder)
    return folders, again


def check_copies(folders: list[Exported], again: list[Path], where: Path) -> None:
    """The copies load without tpcompress as well."""
    (where / "copies").mkdir()
    inputs = [(copy, each.inputs) for copy, each in zip(again, folders, strict=True)]
    found, _, errors = run_child(inputs[::8], where / "copies", again=False)
    assert errors == {}
    for each, answer in zip(folders[::8], found, strict=True):
        assert_same(answer, each.expected)


def test_some_families(tmp_path: Path) -> None:
    run(list(CHEAP), tmp_path, WAYS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_family(way: str, tmp_path: Path) -> None:
    folders, again = run(pairs(), tmp_path, [way])
    check_copies(folders, again, tmp_path)


@pytest.mark.slow
def test_every_pruner(tmp_path: Path) -> None:
    """Each with its defaults, and the first that a tiny LLaVA offers its views at of the layers 0 and 2."""
    layers: dict[str, int] = {}
    for config, layer in sorted(placed_configs(0, 2), key=lambda pair: pair[1]):
        if len(config) == 1:
            layers.setdefault(config["type"], layer)
    assert len(layers) > 25
    folders = [export_tiny("llava", [tp.Stage(name, layer, keep_tokens=9)]) for name, layer in layers.items()]
    found, _, errors = run_child([(e.folder, e.inputs) for e in folders], tmp_path, again=False)
    assert errors == {}
    for each, answer in zip(folders, found, strict=True):
        assert_same(answer, each.expected)


@pytest.mark.slow
def test_every_family_in_bfloat16(tmp_path: Path) -> None:
    folders = [exported(*case) for case in pairs()]
    inputs = []
    for n, each in enumerate(folders):
        inputs.append(tmp_path / f"inputs_{n}.safetensors")
        save_file(in_bfloat16(each), inputs[-1])
    found, _, errors = run_child(
        [(e.folder, path) for e, path in zip(folders, inputs, strict=True)], tmp_path, ["bfloat16"], again=False
    )
    assert errors == {}
    for each, answer in zip(folders, found, strict=True):
        assert_same(answer, answers(tp.load(each.folder, dtype=torch.bfloat16), in_bfloat16(each)))


def in_bfloat16(export: Exported) -> dict[str, torch.Tensor]:
    tensors = load_file(export.inputs)
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in tensors.items()}


@pytest.mark.slow
def test_with_nothing_on_the_path(tmp_path: Path) -> None:
    """`python -I -S`: no site, no current folder, no environment; only the packages beside transformers."""
    run(list(CHEAP), tmp_path, WAYS, isolated=True)


@pytest.mark.slow
def test_from_the_cache_of_the_hub(tmp_path: Path) -> None:
    """By a hub id, transformers fetches every file of the code by its relative imports, one after another."""
    export, commit = exported(*CHEAP[0]), "0123456789" * 4
    repository = tmp_path / "hub" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(export.folder, repository / "snapshots" / commit)
    (answer,), _, errors = run_child([("somebody/tiny", export.inputs)], tmp_path, again=False)
    assert errors == {}
    assert_same(answer, export.expected)


@pytest.mark.slow
def test_an_old_export_gets_code_when_it_is_saved_again(tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "exported_by_0.1.0"
    model, inputs = tp.load(old), exported(*CHEAP[0]).inputs
    model.save_pretrained(tmp_path / "again")
    (answer,), _, errors = run_child([(tmp_path / "again", inputs)], tmp_path, again=False)
    assert errors == {}
    assert_same(answer, answers(model, load_file(inputs)))
