"""`tpcompress push` against a stub of the hub's API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from export.hub_stub import Hub, running
from huggingface_hub import constants

from tpcompress.cli.main import main
from tpcompress.export import load
from tpcompress.export.push import files_to_push, push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_stub")
        yield stub


def test_what_arrives_is_the_folder(hub: Hub, folder: Path, tmp_path: Path, capsys: Any) -> None:
    (folder / "notes.txt").write_text("not of the export")
    assert main(["push", str(folder), "me/pruned"]) == 0
    named = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(hub.files) == {*named, "manifest.json"}
    assert all(content == (folder / name).read_bytes() for name, content in hub.files.items())
    assert [commit["branch"] for commit in hub.commits] == ["main"]
    assert "PUT blob" in hub.requests
    assert f"Uploaded {len(named) + 1} files" in capsys.readouterr().out
    for name, content in hub.files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert load(tmp_path / "downloaded").config.model_type == "tpcompress_llava"


def test_options(hub: Hub, folder: Path) -> None:
    done = push(folder, "pruned", private=True, revision="v2")
    assert (done.repo, hub.repos, hub.branches) == ("me/pruned", {"me/pruned": True}, ["v2"])
    assert hub.commits[0]["branch"] == "v2"
    done = push(folder, "me/pruned", private=True, create_pr=True)
    assert "create_pr=1" in hub.commits[1]["query"]
    assert done.url.endswith("/discussions/1")
    with pytest.raises(ValueError, match="either --revision or --create-pr"):
        push(folder, "me/pruned", revision="v2", create_pr=True)


def test_an_existing_repository_is_continued(hub: Hub, folder: Path) -> None:
    hub.repos["me/pruned"], hub.fail_commits = False, 1
    with pytest.raises(ValueError, match="try again"):
        push(folder, "me/pruned")
    sent = hub.requests.count("PUT blob")
    assert sent == len(list(folder.glob("*.*tensors"))) > 0
    push(folder, "me/pruned")
    assert hub.requests.count("PUT blob") == sent  # what had arrived is not sent again
    with pytest.raises(ValueError, match="exists and is public"):
        push(folder, "me/pruned", private=True)


@pytest.mark.parametrize(
    ("refuse", "line"),
    [
        ((401, "Invalid credentials"), "does not accept the token; log in with `hf auth login`, or set HF_TOKEN."),
        ((403, "no rights in org"), "may not write to org/pruned (no rights in org)"),
        ((500, "out of order"), "The hub refused the upload to org/pruned: out of order (status 500)."),
    ],
)
def test_refusals_are_one_line(refuse: Any, line: str, hub: Hub, folder: Path, capsys: Any) -> None:
    hub.refuse = refuse
    assert main(["push", str(folder), "org/pruned"]) == 2
    said = capsys.readouterr().err.strip()
    assert line in said
    assert len(said.splitlines()) == 1
    assert not hub.commits


def test_no_way_to_the_hub(hub: Hub, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    for change, line in (
        (lambda m: m.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"), "cannot be reached; check the network"),
        (lambda m: m.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set"),
        (lambda m: m.setattr("huggingface_hub.get_token", lambda: None), "There is no token of the hub; log in with"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            assert main(["push", str(folder), "me/pruned"]) == 2
        assert line in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no id of a repository"):
        push(folder, "me/a b")
    assert hub.commits == []


def test_folders_that_are_not_uploaded(hub: Hub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No folder"):
        push(tmp_path / "none", "me/pruned")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no export"):
        push(tmp_path / "empty", "me/pruned")
    edited = Path(shutil.copytree(folder, tmp_path / "edited"))
    (edited / "config.json").write_text((edited / "config.json").read_text().replace("llava", "llavA", 1))
    with pytest.raises(ValueError, match=r"config.json has another sha256; nothing was uploaded"):
        push(edited, "me/pruned")
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "secret").write_text("x")
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="outside of the folder"):
        files_to_push(folder)
    assert hub.requests == []
