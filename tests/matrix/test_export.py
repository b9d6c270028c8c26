"""Every family through a folder and back: same logits, same tokens, same plan, and no way in without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import tolerance
from export.helpers import make_processor
from structure import each_family
from subjects import Subject
from support import family_folder, generate, logit_gap, stir

import tpcompress as tp
from tpcompress.export import load, probe, verify
from tpcompress.insertion.plan import Stage
from tpcompress.models import load_base, load_processor

GATE = {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}
STAGES = [Stage(GATE, 0, keep_ratio=0.3), Stage("divprune", 3, keep_ratio=0.1)]


@pytest.fixture(scope="session")
def processor() -> Any:
    """Export only writes it beside the weights: its probe is a call of the tests, and so no family needs its own."""
    return make_processor()


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@each_family()
def test_round_trip(subject: Subject, processor: Any, tmp_path: Path) -> None:
    model = subject.model
    batch, single = subject.batch((5, subject.kinds, 9), (4, 1, 7)), subject.batch((5, subject.kinds, 9))
    stir(tp.attach(model, subject.plan(STAGES)))
    out = tp.export(model, processor, tmp_path / "out", probe_inputs=batch)
    loaded = load(out)
    assert isinstance(loaded, type(model))
    assert tp.plan_of(loaded).to_dict() == tp.plan_of(model).to_dict() == loaded.config.token_pruning
    state, theirs = model.state_dict(), loaded.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], value) for name, value in state.items())
    with tp.record(model) as ours, tp.record(loaded) as its:
        expected, found = logits(model, single), logits(loaded, single)
        tokens, again = generate(model, batch, new=4), generate(loaded, batch, new=4)
    # Some tiny models run eager attention, and what is loaded takes the best that its class knows.
    assert (found - expected).abs().max() < tolerance(model)
    assert torch.equal(again.sequences, tokens.sequences)
    assert logit_gap(again, tokens) < tolerance(model)
    for a, b in zip(ours.stages, its.stages, strict=True):
        assert torch.equal(a.retained_RV, b.retained_RV)
        assert sum(a.vision_out) < sum(a.vision_in)
    report = verify(out)
    assert report.ok, report
    with tp.mode(model, "off"), tp.mode(loaded, "off"):
        assert (logits(loaded, single) - logits(subject.base, single)).abs().max() < tolerance(model)
        assert (logits(model, single)[:, -1] - expected[:, -1]).abs().max() > 0.05, "control: pruning shows"


def test_no_way_in_without_the_plan(subject: Subject, processor: Any, tmp_path: Path) -> None:
    """The stock class finds no weights; the stock type is not in the config; without a plan nothing is built."""
    model, inputs = subject.model, subject.batch((5, 1, 9))
    out = tp.export(tp.attach(model, subject.plan(STAGES[:1])), processor, tmp_path / "out", probe_inputs=inputs)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        type(model).from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"tpcompress_{subject.config.model_type}"
    assert config["architectures"] == [f"TPCompress{type(model).__name__}"]
    del config["token_pruning"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match="needs a plan under `token_pruning`"):
        load(out)


def test_the_built_in_probe_grows_until_it_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small image has no more tokens than the budget; real ones have. Tiny processors stop at 64 tokens."""
    monkeypatch.setattr(probe, "SIDES", (16, 64))
    folder = family_folder("qwen2_5_vl")
    model, processor = load_base(str(folder)), load_processor(str(folder))
    sides = [probe.default_inputs(processor, side) for side in probe.SIDES]
    tokens = [int((each["input_ids"] == model.config.image_token_id).sum()) for each in sides]
    assert tokens[0] < tokens[-1]
    out = tp.export(tp.attach(model, "uniform", keep_tokens=tokens[0]), processor, tmp_path / "out")
    assert json.loads((out / "manifest.json").read_text())["vision_tokens"] > tokens[0]
    report = verify(out)
    assert report.ok
    assert f"({tokens[0]} of " in str(report)
    card = (out / "README.md").read_text()
    assert "vision tokens per image after its last stage" in card
    assert "Counts are those of the probe, whose image has" in card
    with pytest.raises(ValueError, match="is an export of tpcompress, which always prunes; a base is a dense model"):
        load_base(str(out))
    with pytest.raises(ValueError, match="This model is an export, which carries its plan \\(uniform with"):
        tp.attach(load(out), "uniform", keep_tokens=4)
