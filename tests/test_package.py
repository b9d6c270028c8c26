"""The wheel carries what the commands need: recipes, the bundled base, the digits, the type marker."""

import tomllib
import zipfile
from pathlib import Path

import pytest

from tpcompress.errors import EXTRAS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_tracked_recipe_and_asset_is_inside(names):
    wanted = {f"tpcompress/{p.relative_to(ROOT)}" for p in (ROOT / "recipes").rglob("*.yaml")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "tpcompress/assets").rglob("*") if p.is_file()}
    assert len(wanted) > 12
    assert wanted <= names


def test_every_module_and_the_type_marker_are_inside(names):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "tpcompress").rglob("*.py")}
    assert modules | {"tpcompress/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


def test_the_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "scripts/constraints.txt").read_text().splitlines()}
    for requirement in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        name = requirement.partition(";")[0].partition(">")[0].partition("[")[0].strip().lower()
        assert name in pinned | {"tpcompress"}, requirement


def test_a_missing_module_names_the_extra_that_installs_it():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("train", "eval", "media"):
        names = {requirement.partition(">")[0] for requirement in extras[extra]} - {"tpcompress[train]"}
        assert names == {name for name, listed in EXTRAS.items() if listed == extra}
