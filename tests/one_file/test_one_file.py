"""One file means one file: the files that the guides show, put into a copy of the repository, pass its tests.

For each kind (pruner, family, loss, ...) the code block of its guide is written to the path that the guide names, and
nothing else is edited; a view is one file and one field, and its guide shows a pruner that reads it. Then the contract,
layering, README and documentation tests of the copy run on the new members.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from docs_site.kinds import KINDS

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "scripts/docs_site/guides/adding"
COPIED = ("tpcompress", "recipes", "scripts", "tests", "README.md", "CHANGELOG.md", "pyproject.toml")

CONTRACTS = {
    "pruner": (
        "tests/pruners/test_contract.py",
        "tests/pruners/test_equal_tokens.py",
        "tests/pruners/test_catalogue.py",
    ),
    "scorer": ("tests/pruners/test_scorers.py",),
    "selector": ("tests/pruners/test_selectors.py",),
    "applier": ("tests/pruners/test_appliers.py",),
    "family": ("tests/families/test_families.py", "tests/families/test_catalogue.py", "tests/matrix/test_forward.py"),
    "loss": ("tests/training/losses/test_losses.py",),
    "teacher": ("tests/training/teachers/test_teachers.py",),
    "schedule": ("tests/training/schedules/test_contract.py",),
    "task": ("tests/evaluation/tasks/test_contract.py",),
    "metric": ("tests/evaluation/scoring/test_metric_contract.py",),
}
"""Test files of each kind, of which the tests named after the new member run."""

WHOLE = ("tests/test_layering.py", "tests/test_docs.py", "tests/test_readme.py")
"""Test files that look at all members together."""


LEFT_OUT = ("commands_run", "loading_snippet", "the_site_is_built")
"""Of these what takes long, and looks at members only through what other tests of these files check."""


def shown(one: str) -> tuple[str, str]:
    """Path and content of the file that the guide of a kind shows."""
    text = (GUIDES / f"{one}.md").read_text()
    path = re.search(r"^Write `([\w/.]+\.py)`; nothing else is edited", text, flags=re.M)
    code = re.search(r"```python\n(.*?)```", text, flags=re.S)
    assert path
    assert code
    return path[1], code[1]


def word(one: str) -> str:
    """What the ids of the new member's tests contain."""
    path, code = shown(one)
    if one == "family":
        return Path(path).stem
    names = re.findall(r'^    name = "(\w+)"', code, flags=re.M) or re.findall(r"^class (\w+)", code, flags=re.M)
    return str(names[0])


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with one more file for each kind."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for kind in KINDS:
        path, code = shown(kind.one)
        assert path.startswith(f"{kind.folder}/")
        assert not (folder / path).exists()
        (folder / path).write_text(code)
    add_a_view(folder)
    return folder


def add_a_view(folder: Path) -> None:
    """The file and the field of the guide of views, and the pruner that reads it."""
    text = (GUIDES / "view.md").read_text()
    provider, field, pruner = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    path = re.search(r"^Write `([\w/.]+\.py)`", text, flags=re.M)
    assert path
    (folder / path[1]).write_text(provider)
    (folder / "tpcompress/pruners/question_match.py").write_text(pruner)
    views = folder / "tpcompress/pruners/views.py"
    before, last, after = views.read_text().partition("    pixel_images: int = 1\n")
    assert last
    views.write_text(before + last + field + after)


@pytest.fixture(scope="module")
def outcomes(copy: Path) -> dict[str, str]:
    """Outcomes of the tests of the copy by id, all in one process."""
    files = {file: None for kind in KINDS for file in CONTRACTS[kind.one]} | dict.fromkeys(WHOLE)
    whole = " or ".join(Path(file).stem for file in WHOLE)
    chosen = f"{' or '.join(words().values())} or (({whole}) and not {' and not '.join(LEFT_OUT)})"
    report = copy / "report.xml"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files, "-k", chosen,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = {}
    for test in ElementTree.parse(report).iter("testcase"):
        found[f"{test.attrib['classname']}::{test.attrib['name']}"] = next((child.tag for child in test), "passed")
    return found


def words() -> dict[str, str]:
    """What the ids of the tests of every new member contain."""
    return {kind.one: word(kind.one) for kind in KINDS} | {"view": "question_match"}


def test_contract_tests_find_the_new_members(outcomes: dict[str, str]) -> None:
    assert set(outcomes.values()) <= {"passed", "skipped"}
    for one, name in words().items():
        found = [title for title in outcomes if name.lower() in title.partition("[")[2].lower()]
        assert found, f"no contract test of the new {one} '{name}'"


def test_tests_of_the_whole_tree_pass(outcomes: dict[str, str]) -> None:
    stems = tuple(Path(file).stem for file in WHOLE)
    found = [title for title in outcomes if title.split("::")[0].endswith(stems)]
    assert len(found) > 20
