"""Ways of loading with tpcompress imported: the answers of `tp.load`, and a save that equals the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export.remote_code.child import answers
from export.remote_code.folders import CHEAP, PLANS, exported, pairs
from export.remote_code.test_without_the_package import assert_same, assert_same_folder, in_bfloat16
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, pipeline

import tpcompress as tp
from tpcompress.families import list_families, resolve

Auto = AutoModelForImageTextToText


def offloaded(folder: Path) -> Any:
    """The decoder layers on disk, from where hooks of accelerate read them for each call; the rest on the CPU."""
    whole = tp.load(folder)
    layers = next(name for name, module in whole.named_modules() if module is resolve(whole).layers)
    names = {name for name, _ in whole.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in whole.named_buffers()}
    places = {name: "cpu" for name in names if not name.startswith(f"{layers}.")} | {layers: "disk"}
    return tp.load(folder, device_map=places, offload_folder=folder.parent / "offload")


WAYS: dict[str, Callable[[Path], Any]] = {
    "tp.load": tp.load,
    "Auto class": Auto.from_pretrained,
    "Auto class with trust": lambda folder: Auto.from_pretrained(folder, trust_remote_code=True),
    "pipeline": lambda folder: pipeline("image-text-to-text", model=str(folder), device="cpu").model,
    "device_map=cpu": lambda folder: Auto.from_pretrained(folder, device_map="cpu"),
    "device_map=auto": lambda folder: tp.load(folder, device_map="auto"),
    "offloaded": offloaded,
}


FAMILIES = [
    pytest.param(name, marks=[] if name == "llava" else [pytest.mark.slow], id=name) for name in list_families()
]


def cases() -> list[Any]:
    """Every way with the cheap folders, and all folders marked slow."""
    cheap = {(way, CHEAP[n % len(CHEAP)]) for n, way in enumerate(WAYS)}
    return [
        pytest.param(way, *pair, marks=[] if (way, pair) in cheap else [pytest.mark.slow], id=f"{way}, {pair}")
        for way in WAYS
        for pair in pairs()
    ]


@pytest.mark.parametrize(("way", "family", "plan"), cases())
def test_way(way: str, family: str, plan: str, tmp_path: Path) -> None:
    export = exported(family, plan)
    model = WAYS[way](export.folder).eval()
    assert type(model).__module__ == "tpcompress.export.registry"
    assert_same(answers(model, load_file(export.inputs)), export.expected)
    if way != "offloaded":
        model.save_pretrained(tmp_path / "again")
        assert_same_folder(tmp_path / "again", export.folder)


@pytest.mark.parametrize(
    ("family", "plan"), [pair if pair in CHEAP else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs()]
)
def test_bfloat16(family: str, plan: str) -> None:
    export = exported(family, plan)
    inputs = in_bfloat16(export)
    first = answers(tp.load(export.folder, dtype=torch.bfloat16), inputs)
    assert_same(answers(Auto.from_pretrained(export.folder, dtype=torch.bfloat16), inputs), first)
    assert not torch.equal(first["logits"], export.expected["logits"]), "control: it is another dtype"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_answers_a_question_about_an_image(family: str) -> None:
    """The task `image-text-to-text` finds the processor and prunes: its trace has a stage."""
    export = exported(family, next(iter(PLANS)))
    ask = pipeline("image-text-to-text", model=str(export.folder), device="cpu")
    if ask.processor.chat_template is None or family == "got_ocr2":
        pytest.skip("its processor takes no chat with an image")
    image = Image.effect_noise((48, 48), 80).convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]
    with tp.record(ask.model) as trace:
        (found,) = ask(text=[chat], max_new_tokens=4)
    assert isinstance(found if isinstance(found, dict) else found[0], dict)
    assert sum(trace.stages[0].vision_out) < sum(trace.stages[0].vision_in)
