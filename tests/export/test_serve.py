"""`tpcompress serve`: the server of transformers runs the plan, and answers the `openai` client as our own model."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import ROOT, make_base

import tpcompress as tp
from tpcompress.cli.main import main
from tpcompress.export import load, load_processor, serve
from tpcompress.export.serve import unreadable_images
from tpcompress.families.llava import tiny_processor

QUESTION = "t7 t8 t9"
DECODE = """
try:
    import torchvision.io as io
    io.decode_image(__import__("torch").zeros(1, dtype=__import__("torch").uint8))
except ImportError:
    pass
except RuntimeError as error:
    if "image extension" in str(error):  # torchvision of PyPI beside torch's CPU build cannot read files
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor
        io.decode_image = lambda data, **options: pil_to_tensor(
            Image.open(__import__("io").BytesIO(data.numpy().tobytes())).convert("RGB"))
"""


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose processor has a chat template."""
    model = tp.attach(make_base(), "divprune:8@0")
    return tp.export(model, tiny_processor(model.config), tmp_path_factory.mktemp("serve") / "chatty")


def image() -> Any:
    from tpcompress.export.probe import _image

    return _image(32)


def own_answers(folder: Path) -> tuple[str, str]:
    """Our greedy answer, and that of the same model unpruned."""
    model, processor = load(folder), load_processor(folder)
    content = [{"type": "image", "image": image()}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    found = []
    for mode in ("drop", "off"):
        with tp.mode(model, mode), torch.no_grad():
            new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(new, skip_special_tokens=True))
    return found[0], found[1]


def test_the_server_loads_the_attached_model(chatty: Path) -> None:
    name = serve.register_with_server(chatty)
    from transformers.cli.serving.model_manager import ModelManager

    manager = ModelManager(device="cpu", force_model=str(chatty))
    model, processor = manager.load_model_and_processor(manager.process_model_name(str(chatty)))
    assert type(model).__name__ == name == "TPCompressLlavaForConditionalGeneration"
    assert tp.plan_of(model).to_dict() == tp.plan_of(load(chatty)).to_dict()
    assert manager.get_model_modality(model, processor).value == "MULTIMODAL"
    manager.shutdown()


def test_choice_of_the_engine(chatty: Path, monkeypatch: Any) -> None:
    manifest = chatty / "manifest.json"
    text, values = manifest.read_text(), json.loads(manifest.read_text())
    monkeypatch.setattr(serve.shutil, "which", lambda name, path=None: None)
    assert serve.choose_engine(chatty) == "transformers"
    try:
        manifest.write_text(json.dumps(values | {"runtimes": {"vllm": None}}))
        with pytest.raises(ModuleNotFoundError, match="vLLM is not installed"):
            serve.choose_engine(chatty, "vllm")
        monkeypatch.setattr(serve.shutil, "which", lambda name, path=None: None if path else f"/bin/{name}")
        assert [serve.choose_engine(chatty, e) for e in serve.ENGINES] == ["vllm", "transformers", "vllm"]
        called: list[Any] = []
        monkeypatch.setattr(serve.os, "execv", lambda *args: called.append(args))
        serve.serve_vllm(str(chatty), "127.0.0.1", 81)
        assert called == [("/bin/vllm", ["vllm", "serve", str(chatty), "--host", "127.0.0.1", "--port", "81", "--dtype",
                                         "auto"])]  # fmt: skip
        manifest.write_text(json.dumps(values | {"runtimes": {"vllm": "it reads the prompt"}}))
        assert serve.choose_engine(chatty) == "transformers"
        with pytest.raises(ValueError, match=r"vLLM cannot serve .*: it reads the prompt"):
            serve.choose_engine(chatty, "vllm")
    finally:
        manifest.write_text(text)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError):
        serve.choose_engine(chatty, "transformers")


def test_mistakes_are_one_line(chatty: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, line in (
            ([str(tmp_path / "none")], "none"),
            ([str(tmp_path / "empty")], "is no export of tpcompress"),
            ([str(chatty), "--engine", "sglang"], "engine must be one of auto, transformers, vllm"),
            ([str(chatty), "--engine", "transformers", "--port", str(taken.getsockname()[1])], "give another --port"),
        ):
            assert main(["serve", *arguments]) == 2
            said = capsys.readouterr().err.strip()
            assert line in said
            assert len(said.splitlines()) == 1
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main(["serve", str(chatty), "--engine", "transformers"]) == 2
    assert "pip install 'tpcompress[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_question_through_the_openai_client(chatty: Path, tmp_path: Path) -> None:
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tpcompress", "serve", str(chatty), "--engine", "transformers", "--device", "cpu",
               "--port", str(port)]  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(DECODE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            _wait(server, port)
            png = io.BytesIO()
            image().save(png, "PNG")
            uri = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            ask = {"model": str(chatty), "messages": [{"role": "user", "content": content}], "max_tokens": 12,
                   "temperature": 0}  # fmt: skip
            answer = client.chat.completions.create(**ask)
            streamed = "".join(part.choices[0].delta.content or "" for part in client.chat.completions.create(
                **ask, stream=True))  # fmt: skip
        finally:
            server.send_signal(signal.SIGINT)
            printed = server.communicate(timeout=60)[0]
    pruned, dense = own_answers(chatty)
    assert answer.choices[0].message.content == pruned == streamed, printed[-2000:]
    assert pruned != dense
    assert "8 of 64 vision tokens" in printed
    # The server counts the prompt as the processor makes it, before the plan prunes it.
    assert answer.usage.prompt_tokens > 64
    assert server.returncode == 0, printed[-2000:]


def _wait(server: Any, port: int) -> None:
    for _ in range(240):
        if server.poll() is not None:
            raise AssertionError(server.stdout.read())
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")


def test_a_torchvision_that_cannot_read_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")

    def broken(*_: object) -> None:
        raise RuntimeError("Couldn't load the image extension\nmore")

    monkeypatch.setattr(torchvision.io, "encode_png", lambda image: image)
    monkeypatch.setattr(torchvision.io, "decode_image", lambda data: data)
    assert unreadable_images() is None
    monkeypatch.setattr(torchvision.io, "decode_image", broken)
    said = unreadable_images() or ""
    assert "Couldn't load the image extension" in said
    assert "\n" not in said
    assert "install the torchvision of the same release" in said
