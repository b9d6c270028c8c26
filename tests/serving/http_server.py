"""`vllm serve` in a process of its own, and requests to it over HTTP."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.served import ROOT, TOKENS, vllm_environment, vllm_python

START = 400
"""Seconds until a server must answer; a first start compiles."""


@dataclass(frozen=True)
class Server:
    """A server that answers: where, the name of its model, and its log."""

    url: str
    model: str
    log: Path

    def ask(self, words: str, images: Sequence[str], never: Sequence[int]) -> dict[str, Any]:
        """The greedy completion of one turn with image files, with token ids.

        Chat requests get no start token unless they ask for it; processors of transformers add it.
        """
        data = [base64.b64encode(Path(image).read_bytes()).decode() for image in images]
        content: list[Any] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{each}"}} for each in data
        ]
        content.append({"type": "text", "text": words})
        body = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, "add_special_tokens": True,
            "logit_bias": {str(token): -100 for token in never},
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        values = re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        assert values, f"no counter {name}"
        return sum(map(float, values))


@contextmanager
def serving(command: Sequence[str], folder: Path, out: Path) -> Iterator[Server]:
    """Run a command of the vLLM environment that serves a folder, until the block ends.

    Args:
        command: name of the command in that environment and its arguments; `--port` is added.
        folder: the model.
        out: where the log goes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = out / "server.log"
    name, *arguments = command
    with log.open("w") as written:
        process = subprocess.Popen(
            [str(vllm_python().with_name(name)), *arguments, "--port", str(port)], stdout=written,
            stderr=subprocess.STDOUT, env=vllm_environment(), cwd=ROOT, start_new_session=True,
        )  # fmt: skip
    try:
        server = Server(f"http://127.0.0.1:{port}", str(folder), log)
        _wait(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert process.poll() is None, server.log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start:\n" + server.log.read_text()[-6000:])
