"""The shape of the suite: short files, in folders that mirror the package."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "tpcompress"
MAX_LINES = 400
BESIDE_THE_PACKAGE = {"matrix", "main_job", "scripts", "one_file"}
"""Folders whose subject is not one folder: insertion on every class, commands on every family, scripts/, guides."""


def test_no_file_is_longer_than_400_lines() -> None:
    lines = {path.relative_to(TESTS): len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert len(lines) > 100
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_folders_are_those_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path(".")}
    assert len(folders) > 15
    missing = {str(f) for f in folders if f.parts[0] not in BESIDE_THE_PACKAGE and not (PACKAGE / f).is_dir()}
    assert missing == set()
