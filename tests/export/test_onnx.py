"""The image side of an export as one ONNX graph: equal to the attached model, for every pruner that exports."""

from __future__ import annotations

import inspect
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import ROOT, make_base
from support import batch, config_id, main_families_first, pruner_configs, tiny_model

import tpcompress as tp
from tpcompress.cli.main import main
from tpcompress.errors import EXTRAS
from tpcompress.export import load, load_processor
from tpcompress.export.onnx import export_onnx, write
from tpcompress.export.onnx.graph import ImageGraph, why_no_graph
from tpcompress.export.onnx.write import check_as_attached, write_graph
from tpcompress.export.probe import _image
from tpcompress.export.runtimes import runtimes_of
from tpcompress.export.runtimes.onnx import FAMILIES, PRUNERS
from tpcompress.families import list_families, resolve
from tpcompress.families.llava import tiny_processor
from tpcompress.insertion.views.available import why_unavailable
from tpcompress.pruners import create
from tpcompress.pruners.catalogue import unserved

QUESTION = "t7 t8 t9"
SERVED: dict[str, dict[str, Any]] = {}
for _config in pruner_configs():
    _pruner = create(dict(_config))
    if unserved(_pruner) is None and why_unavailable(resolve(tiny_model()), _pruner, 0) is None:
        SERVED.setdefault(_config["type"], _config)
"""The first arguments of each pruner with which it is part of an encoder, and the tiny tower shows what it reads."""


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose processor has a chat template."""
    model = tp.attach(make_base(), "divprune:8@0")
    return tp.export(model, tiny_processor(model.config), tmp_path_factory.mktemp("onnx") / "chatty")


@pytest.fixture(scope="module")
def graph(chatty: Path) -> Path:
    return export_onnx(chatty, chatty.with_name("graph")).folder


def test_a_language_model_fed_by_onnx_runtime_answers_as_the_export(chatty: Path, graph: Path) -> None:
    about = json.loads((graph / "manifest.json").read_text())
    assert about["outputs"] == {"features": [8, 64], "indices": [8]}
    assert (about["placeholders"], about["retained"], about["opset"]) == (64, [8], 18)
    assert about["checked"]["images"] == 4
    recipe = runpy.run_path(str(ROOT / "recipes" / "onnx" / "onnx_features.py"))
    found = recipe["answer"](chatty, graph, _image(32), QUESTION)
    model, processor = load(chatty), load_processor(chatty)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[_image(32)], text=[text], return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    own = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert found == own.tolist()
    with tp.disabled(model):
        assert found != model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def test_command(chatty: Path, graph: Path, capsys: Any, monkeypatch: Any) -> None:
    assert main(["onnx", str(chatty), str(graph)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["onnx", str(graph), str(graph.with_name("again"))]) == 2
    assert "is not of a tpcompress export" in capsys.readouterr().err
    monkeypatch.setattr(write, "find_spec", lambda name: None)
    assert main(["onnx", str(chatty), str(graph.with_name("again"))]) == 2
    assert "pip install 'tpcompress[onnx]'" in capsys.readouterr().err
    assert {EXTRAS[name] for name in write.PACKAGES} == {"onnx"}


@pytest.mark.parametrize("plan", ["fastv:8@2", "uniform:8@0,uniform:4@3"])
def test_plans_outside_the_encoder_are_refused_by_name(plan: str) -> None:
    model = tp.attach(make_base(), plan)
    reason = why_no_graph(model)
    assert reason is not None
    assert "inside the language model" in reason
    with pytest.raises(ValueError, match=re.escape(f"No ONNX graph: {reason}.")):
        ImageGraph(model, {"pixel_values": torch.zeros(1, 3, 32, 32)})
    assert runtimes_of(tp.plan_of(model), model.config)["onnx"] == reason


def test_a_wrong_graph_is_not_written(chatty: Path, monkeypatch: Any) -> None:
    out = chatty.with_name("wrong")
    monkeypatch.setattr(write, "check_graph", lambda *_: write.Checked(4, 0.0, 1.0, indices=False))
    with pytest.raises(ValueError, match=r"No ONNX graph of divprune on llava: ONNX Runtime retains other tokens"):
        export_onnx(chatty, out)
    assert not out.exists()


def test_the_table_has_every_pruner_and_family() -> None:
    assert set(SERVED) == set(PRUNERS)
    assert set(FAMILIES) == set(list_families())
    shown = (Path(inspect.getfile(write)).with_name("README.md")).read_text()
    for name, verdict in (*PRUNERS.items(), *FAMILIES.items()):
        assert f"| `{name}` | {verdict} |" in shown, name


@pytest.mark.slow
@pytest.mark.parametrize("config", SERVED.values(), ids=config_id)
def test_every_pruner(config: dict[str, Any], tmp_path: Path) -> None:
    """Exports as the table says: with equal indices and features, or refused."""
    model = tp.attach(make_base(), tp.PruningPlan([tp.Stage(config, 0, keep_tokens=9)]))
    processor = tiny_processor(model.config)
    inputs = write.default_inputs(processor)
    found = tried(model, inputs, {"pixel_values": inputs["pixel_values"]}, tmp_path)
    assert (found == "yes") == (PRUNERS[config["type"]] == "yes"), found


@pytest.mark.slow
@pytest.mark.parametrize("name", main_families_first())
def test_every_family(name: str, tmp_path: Path) -> None:
    model = tp.attach(tiny_model(name), "divprune:4@0")
    inputs = batch([(2, 1, 2)], family=name, config=model.config)
    names = inspect.signature(type(resolve(model).core).get_image_features).parameters
    arguments = {key: value for key, value in inputs.items() if key in names and key != "input_ids"}
    found = tried(model, inputs, arguments, tmp_path)
    assert (found == "yes") == (FAMILIES[name] == "yes"), found


def tried(model: Any, inputs: Any, arguments: Any, folder: Path) -> str:
    """`yes`, or the reason why there is no graph."""
    try:
        made = ImageGraph(model, arguments).eval()
        check_as_attached(model, made, inputs, arguments["pixel_values"])
        return "yes" if write_graph(made, arguments["pixel_values"], folder / "x.onnx", "x").ok else "differs"
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return str(error)
