"""`vllm serve` and `tpcompress serve --engine vllm` over HTTP answer as transformers. Run by scripts/test_vllm."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from serving.http_server import serving
from serving.served import export, never, of_transformers, pictures, request, run_vllm

import tpcompress as tp

pytestmark = pytest.mark.vllm

WORDS = ("look at the whole image and say what it is", "look at the whole image and say how many there are")
POSITIONS = 160
"""Of the language model: enough for one unpruned image and a question, not for two."""
SHORT = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(POSITIONS), "--block-size", "32"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """An export, two images, and what transformers answers: both questions about one image, one about the other."""
    out = tmp_path_factory.mktemp("http")
    folder = export("llava", "divprune:16@0", out / "export", "original", max_positions=POSITIONS)
    processor, images = tp.load_processor(folder), pictures(out, ((48, 48), (48, 48)))
    asked = [(WORDS[0], images[0]), (WORDS[1], images[0]), (WORDS[0], images[1])]
    (expected,) = of_transformers(folder, [[request(processor, words, [image]) for words, image in asked]])
    return folder, images, expected


@pytest.mark.parametrize("command", [["vllm", "serve"], ["tpcompress", "serve", "--engine", "vllm"]], ids=" ".join)
def test_questions_about_images(command: list[str], served: Any, tmp_path: Path) -> None:
    folder, (first, second), expected = served
    arguments = SHORT if command[0] == "vllm" else ["--dtype", "float32"]
    processor, hidden = tp.load_processor(folder), never(tp.load(folder).config)
    with serving([*command, str(folder), *arguments], folder, tmp_path) as server:
        found, hits = [], []
        for words, image in [(WORDS[0], first), (WORDS[1], first), (WORDS[0], second)]:
            found.append(server.ask(words, [image], hidden))
            hits.append((server.metric("mm_cache_hits"), server.metric("prefix_cache_hits")))
        with pytest.raises(HTTPError) as error:
            server.ask(WORDS[0], [first, second], hidden)
    for our, their in zip(expected, found, strict=True):
        assert their["usage"]["prompt_tokens"] == our["prompt_tokens"] < our["unpruned_tokens"]
        assert their["choices"][0]["token_ids"] == our["ids"]
        assert their["choices"][0]["message"]["content"] == processor.decode(our["ids"], skip_special_tokens=True)
    assert error.value.code == 400
    text = error.value.read().decode()
    assert f"the model has {POSITIONS} positions; send fewer or smaller images" in text
    # The second question finds the image in the caches, the third has a new one.
    assert [images - hits[0][0] for images, _ in hits] == [0, 1, 1]
    if command[0] == "vllm":  # its blocks are shorter than the prompt
        assert hits[1][1] - hits[0][1] >= 32
    assert found[0]["choices"][0]["token_ids"] != found[2]["choices"][0]["token_ids"]


def test_a_refused_plan_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    folder = export("llava", "cdpruner:16@0", tmp_path / "export", "original")
    run = run_vllm(["serve", str(folder), *SHORT], command="vllm")
    assert run.returncode != 0
    lines = (run.stdout + run.stderr).splitlines()
    assert any("vLLM cannot serve" in line and "'cdpruner' reads the prompt" in line for line in lines), lines[-30:]
    run = run_vllm(["serve", str(folder), "--engine", "vllm"], command="tpcompress")
    assert run.returncode == 2
    (line,) = run.stderr.strip().splitlines()
    assert "vLLM cannot serve" in line
    assert "'cdpruner' reads the prompt" in line
