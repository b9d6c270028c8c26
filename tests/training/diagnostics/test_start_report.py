"""At the start of a run stands what a real row becomes; a run that prunes nothing does not start."""

import json
import re

import pytest
import torch
from support import family_folder, tiny_model

from tpcompress.families import resolve
from tpcompress.training.datamodules.chat import ChatData
from tpcompress.training.diagnostics.estimate import device_memory, estimate


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if re.match("First batch|stage|memory|step, ", line)]


def test_it_says_what_the_first_batch_becomes(work, capsys):
    stages = [{"pruner": "pool", "layer": 0, "keep_tokens": 36}, {"pruner": "uniform", "layer": 2, "keep_ratio": 0.125}]
    work.fit(trainer={"max_steps": 1}, model={"plan": {"stages": stages}})
    first, pool, uniform, memory, step = lines(capsys)
    assert re.fullmatch(
        r"First batch: 2 rows, \d images?: vision tokens 144 per image, \d.* per row; sequence \d+.*", first
    )
    assert pool.startswith("stage 0 (pool, layer 0): retains 36 of 144 per image; sequence ")
    assert uniform.startswith("stage 1 (uniform, layer 2): retains 18 of 144 per image; sequence ")
    assert re.fullmatch(
        r"memory, estimated by formula: .*B weights \+ .*B gradients \+ .*B AdamW \+ .*B activations = .*B of host "
        r"memory \(.*B\)", memory
    )  # fmt: skip
    assert re.fullmatch(r"step, estimated by formula: .*FLOPs per device, at least .* s at the .*FLOP/s of a .*", step)


@pytest.mark.slow
def test_a_dense_run_has_no_stages(work, capsys):
    work.fit(trainer={"max_steps": 1}, model={"plan": None})
    found = lines(capsys)
    assert len(found) == 3
    assert "vision tokens 144 per image" in found[0]


def test_rows_without_an_image_are_said(work, capsys, monkeypatch):
    monkeypatch.setattr(ChatData, "_has_plan", lambda self: False)  # which refuses them where they can be counted
    work.fit(trainer={"max_steps": 1}, data={"train": str(work.chat / "text.json")})
    assert "none of the first 10 rows has an image to prune" in capsys.readouterr().err.replace("\n", " ")


def test_a_plan_that_prunes_nothing_does_not_train(work, capsys):
    """SmolVLM with 16 of 16 tokens per tile; over the tiles of an image the same count prunes."""
    model = {"base": str(family_folder("smolvlm")), "optimizer": {"lr": 1e-3}}
    plan = {"stages": [{"pruner": "divprune", "layer": 0, "keep_tokens": 16}], "scope": "tile"}
    rows = json.loads((work.chat / "chat.json").read_text())
    (work.chat / "images.json").write_text(json.dumps([row for row in rows if "image" in row]))
    data = {"train": str(work.chat / "images.json")}
    with pytest.raises(ValueError, match="retains all of the 16 vision tokens per tile in the first"):
        work.fit(model=model | {"plan": plan}, data=data)
    assert not list((work.folder / "run").rglob("*.ckpt"))
    capsys.readouterr()
    work.fit("whole", trainer={"max_steps": 1}, model=model | {"plan": plan | {"scope": "image"}}, data=data)
    assert "retains 16 of " in lines(capsys)[1]


def test_the_formula_of_memory():
    """Six layers of width 64, 4 query and 2 key heads of 16, MLP width 96, vocabulary 128; fp32."""
    model = tiny_model().requires_grad_(False)
    parts, B, answers = resolve(model), 2, 3
    frozen = estimate(parts, model, [[10] * 6, [8] * 6], 64, answers, torch.bfloat16)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    per_token = 4 * 64 + 2 * 64 + 2 * 32 + 3 * 96
    assert (frozen.weights, frozen.gradients, frozen.optimizer) == (weights, 0, 0)
    assert frozen.activations == 6 * B * 10 * per_token * 2 + 2 * 4 * answers * 128
    assert frozen.memory == weights + frozen.activations
    model.requires_grad_(True)
    trained = estimate(parts, model, [[10] * 6, [8] * 6], 64, answers, torch.bfloat16)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert (trained.gradients, trained.optimizer) == (size, 2 * size)
    assert trained.flops > 1.3 * frozen.flops
    recomputed = estimate(parts, model, [[10] * 6, [8] * 6], 64, answers, torch.bfloat16, checkpointing=True)
    assert recomputed.activations == (6 * B * 10 * 64 + B * 10 * per_token) * 2 + 2 * 4 * answers * 128
    assert recomputed.flops > 1.2 * trained.flops
    total, name = device_memory(torch.device("cpu"))
    assert total > 2**30
    assert name == "of host memory"
