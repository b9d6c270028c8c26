"""Lists that were printed before are answered from the cache, without the frameworks."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tpcompress.cli import list_cache
from tpcompress.cli.list_cache import print_kept


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that were made, in a process without torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(list_cache, "sys", SimpleNamespace(modules={}))
    return []


def printed(made: list[str], *asked: str, width: int = 80) -> str:
    def write(console: Console) -> None:
        made.append(f"{asked} {console.width} {len(made)}")
        console.print(made[-1])

    file = io.StringIO()
    print_kept(Console(file=file, width=width), asked, write)
    return file.getvalue()


def test_the_same_list_is_made_once(made: list[str]) -> None:
    first = printed(made, "list", "pruners")
    assert printed(made, "list", "pruners") == first
    assert len(made) == 1
    assert printed(made, "list", "pruners", width=120) != first, "another width is another text"
    assert printed(made, "list", "families") != first
    assert len(made) == 3


def test_a_changed_package_makes_its_lists_again(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = printed(made, "list", "pruners")
    monkeypatch.setattr(list_cache, "state", lambda: "changed")
    assert printed(made, "list", "pruners") != first
    assert [path.name for path in list_cache.cache_folder().iterdir()] == ["changed"], "old texts are removed"


def test_the_state_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_cache, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("a = 1")
    states = [list_cache.state()]
    (tmp_path / "a.py").write_text("a = 12")
    states.append(list_cache.state())
    (tmp_path / "b.py").write_text("")
    states.append(list_cache.state())
    assert len(set(states)) == 3
    assert list_cache.state() == states[-1]


def test_nothing_is_kept_of_classes_outside_or_beside_torch(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed(made, "list", "pruners", "package.module.Mine")
    printed(made, "list", "pruners", "package.module.Mine")
    monkeypatch.setattr(list_cache, "sys", SimpleNamespace(modules={"torch": None}))
    printed(made, "list", "pruners")
    assert len(made) == 3
    assert not list_cache.cache_folder().exists()


def test_a_folder_that_cannot_be_written_is_no_error(made: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert printed(made, "list", "pruners")


@pytest.mark.slow
@pytest.mark.parametrize("args", [["pruners"], ["families"], ["list", "losses", "KL"], ["pruners", "dart", "--plan"]])
def test_the_second_answer_imports_no_torch(args: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tpcompress.cli.main import main\n"
        f"code = main({args!r})\nprint('torch' in sys.modules, file=sys.stderr)\nsys.exit(code)"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.stderr.split()[-1] == "True"
    assert second.stderr.split() == ["False"]
    assert second.stdout == first.stdout != ""
