"""What the processors need to be installed, and what is said where it is not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support import MAIN_FAMILIES, family_folder

from tpcompress import models
from tpcompress.errors import EXTRAS
from tpcompress.families import list_families, packages
from tpcompress.families.packages import missing_line, missing_packages

LOAD_WITHOUT = """
import json, sys
for name in {packages!r}:
    sys.modules[name] = None
from tpcompress.models import load_processor
said = {{}}
for family, folder in json.loads(sys.argv[1]).items():
    try:
        said[family] = type(load_processor(folder)).__name__
    except ValueError as error:
        said[family] = str(error)
print(json.dumps(said))
"""


def load_without(names: list[str], *families: str) -> dict[str, str]:
    """What a process without these packages says when it loads the processors of families."""
    folders = {name: str(family_folder(name)) for name in families}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT.format(packages=names), json.dumps(folders)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def said_of(family: str, package: str) -> str:
    return (
        f"The processor of '{family_folder(family)}' cannot be loaded: the processor of {family} needs {package}, not "
        "installed here; run: pip install 'tpcompress[media]'"
    )


def test_requirements_are_packages_of_the_extras() -> None:
    needed = {name: family.requires for name, family in list_families().items()}
    assert {package for names in needed.values() for package in names} == {"torchvision", "num2words"}
    assert all(package in EXTRAS for names in needed.values() for package in names)
    assert needed["llava"] == ()
    assert needed["smolvlm"] == ("torchvision", "num2words")
    assert all(missing_packages(family) == [] for family in list_families().values())


def test_one_line_names_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    line = missing_line(list_families()["smolvlm"])
    assert line == (
        "the processor of smolvlm needs torchvision and num2words, not installed here; "
        "run: pip install 'tpcompress[media]'"
    )
    assert missing_line(list_families()["llava"]) is None


def test_another_error_of_a_processor_stands(tmp_path) -> None:
    with pytest.raises(ValueError, match="^No processor at ") as error:
        models.load_processor(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_processor_is_loaded_without_what_it_does_not_require() -> None:
    """The tables of requirements are true: exactly these families are refused, each in a line that names it."""
    said = load_without(["torchvision", "num2words"], *list_families())
    for name, family in list_families().items():
        assert said[name] == (said_of(name, " and ".join(family.requires)) if family.requires else said[name]), name
        assert family.requires or said[name].endswith("Processor"), name


@pytest.mark.slow
def test_a_package_that_is_missing_alone_is_named_alone() -> None:
    said = load_without(["num2words"], *MAIN_FAMILIES)
    assert said.pop("smolvlm") == said_of("smolvlm", "num2words")
    assert all(words.endswith("Processor") for words in said.values())
