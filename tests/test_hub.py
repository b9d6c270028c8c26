"""Names that are no folder are answered at once, without the retries of the hub client."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants

from tpcompress import hub
from tpcompress.data import load_chat
from tpcompress.models import load_base, load_processor


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.mark.parametrize("name", ["/gone", "./gone", "~/gone", "runs/gone/export", "gone/"])
def test_paths_are_told_from_hub_ids(name: str) -> None:
    assert hub.looks_like_path(name)
    for load in (load_base, load_processor):
        with pytest.raises(FileNotFoundError, match=r"No folder .*gone/?.*; give a folder, a hub id"):
            load(name)


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ValueError, match="No model at 'nobody/gone': it is no folder .* cannot be reached."):
        load_base("nobody/gone")
    assert asked == [("huggingface.co", 443)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in (hub.why_absent("nobody/gone") or "")
    assert len(asked) == 1


def test_an_unreachable_hub_leaves_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    flags = lambda: (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)  # noqa: E731
    for answers in (True, False):
        monkeypatch.setattr(hub, "reachable", lambda endpoint, answers=answers: answers)
        with hub.offline_if_unreachable():
            assert flags() == (not answers, not answers)
        assert flags() == (False, False)
    with pytest.raises(FileNotFoundError, match="nobody/gone"):
        load_chat("nobody/gone")


def test_a_hub_behind_a_proxy_or_with_a_cached_file_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy:80"})
    assert hub.why_absent("nobody/gone") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    assert hub.why_absent("nobody/gone") is None
