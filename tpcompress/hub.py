"""Tells a hub id from a mistyped folder before anything is requested: the hub client retries for many seconds."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT = 5.0
"""Seconds that the hub has to accept a connection."""


def why_absent(name: str, file: str = "config.json", repo_type: str = "model") -> str | None:
    """Why a name that is no local folder cannot be a repository of the hub either; None if it may be one.

    Args:
        name: hub id, or something meant as a path.
        file: file of the repository that may be in the cache of the hub client.
        repo_type: `model` or `dataset`.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if looks_like_path(name):
        return f"there is no folder {name}"
    if isinstance(try_to_load_from_cache(name, file, repo_type=repo_type), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return "it is no folder and not in the cache of the hub, and HF_HUB_OFFLINE is set"
    if not reachable(constants.ENDPOINT):
        return f"it is no folder and not in the cache of the hub, and {constants.ENDPOINT} cannot be reached"
    return None


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Use the caches of the hub clients alone if the hub cannot be reached, without their retries."""
    from huggingface_hub import constants

    clients = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    before = [client.HF_HUB_OFFLINE for client in clients]
    if not any(before) and not reachable(constants.ENDPOINT):
        for client in clients:
            client.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for client, value in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = value


def looks_like_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which has one slash at most and no dots or slashes at its ends."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1


def reachable(endpoint: str) -> bool:
    """Whether the hub accepts a connection; behind a proxy, which is not tried, it is assumed to."""
    url = urlsplit(endpoint)
    if url.scheme in urllib.request.getproxies():
        return True
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    try:
        with socket.create_connection(address, TIMEOUT):
            return True
    except OSError:
        return False
