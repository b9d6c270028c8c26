"""A stand-in for the hub's API on this machine: it keeps repositories in memory and records every request."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the stub holds.

    Attributes:
        url: address.
        repos: id -> whether it is private.
        blobs: content of large files by sha256.
        branches, commits, requests: what came.
        refuse: status and message of every write; None accepts.
    """

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refuse: tuple[int, str] | None = None
    fail_commits: int = 0

    @property
    def files(self) -> dict[str, bytes]:
        """Content of the repository after all commits."""
        found: dict[str, bytes] = {}
        for commit in self.commits:
            found |= commit["files"]
        return found


@contextmanager
def running() -> Iterator[Hub]:
    """A stub that listens on a free port of 127.0.0.1 until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(hub, *args))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, values: Any = None) -> None:
        body = json.dumps({} if values is None else values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        if status >= 400 and isinstance(values, dict):
            self.send_header("X-Error-Message", values.get("error", ""))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"GET {path}")
        repo = path.removeprefix("/api/models/").partition("/revision")[0]
        if repo in hub.repos:
            self.answer(200, {"id": repo, "private": hub.repos[repo], "sha": "0" * 40, "siblings": []})
        else:
            self.answer(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        name, content = self.path.rpartition("/")[2], self.body()
        self.hub.requests.append("PUT blob")
        self.hub.blobs[name] = content
        self.answer(200)

    def do_POST(self) -> None:
        hub, body = self.hub, self.body()
        path, _, query = self.path.partition("?")
        hub.requests.append(f"POST {path}")
        if hub.refuse is not None and path != "/api/validate-yaml":
            return self.answer(hub.refuse[0], {"error": hub.refuse[1]})
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization') or 'me'}/{values['name']}"
            new = name not in hub.repos
            hub.repos.setdefault(name, bool(values.get("private") or values.get("visibility") == "private"))
            text = {"url": f"{hub.url}/{name}", "id": name, "name": name}
            return self.answer(200 if new else 409, text if new else text | {"error": "You already created this repo"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.search(r"/branch/(.+)$", path):
            hub.branches.append(found[1])
            return self.answer(200)
        if "/preupload/" in path:
            return self.answer(200, {"files": [self.mode(each) for each in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(
                200, {"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]}
            )
        if "/commit/" in path:
            return self.commit(path, query, body)
        return self.answer(404, {"error": f"no {path}"})

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".tensors"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def place(self, blob: dict[str, Any]) -> dict[str, Any]:
        """Where a large file goes; nowhere if its content is there."""
        oid = {"oid": blob["oid"], "size": blob["size"]}
        if blob["oid"] in self.hub.blobs:
            return oid
        return oid | {"authenticated": True, "actions": {"upload": {"href": f"{self.hub.url}/blob/{blob['oid']}"}}}

    def commit(self, path: str, query: str, body: bytes) -> None:
        hub = self.hub
        if hub.fail_commits:
            hub.fail_commits -= 1
            return self.answer(500, {"error": "try again"})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            files[value["path"]] = hub.blobs[value["oid"]] if large else base64.b64decode(value["content"])
        hub.commits.append({"branch": path.rpartition("/")[2], "query": query, "files": files})
        url = f"{hub.url}/{path.removeprefix('/api/models/').partition('/commit/')[0]}"
        found = {"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": f"{url}/discussions/1"}
        return self.answer(200, found)
