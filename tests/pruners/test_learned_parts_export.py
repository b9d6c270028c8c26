"""A learned choice merged by size, end to end: attach, train, export, verify, load."""

from __future__ import annotations

from pathlib import Path

import torch
from export.helpers import make_base, make_inputs, make_processor

import tpcompress as tp
from tpcompress.export import export, verify
from tpcompress.insertion.attach import attachment_of


def test_a_merged_gate_trains_and_ships(tmp_path: Path) -> None:
    gate = {"type": "learned_gate", "scorer": {"type": "local_global", "width": 16}}
    config = {"type": "merged", "pruner": {"type": "mmr", "pruner": gate}, "proportional": True}
    torch.manual_seed(0)
    model = tp.attach(make_base(), config, keep_tokens=16)
    before = {name: weight.clone() for name, weight in attachment_of(model).pruners.state_dict().items()}
    weights = tp.trainable(model, "pruner")
    assert {id(w) for w in weights} == {id(w) for w in attachment_of(model).pruners.parameters()}
    optimizer = torch.optim.SGD(weights, lr=1.0)
    inputs = make_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    after = attachment_of(model).pruners.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    folder = export(model.eval(), make_processor(), tmp_path / "out")
    assert verify(folder).ok
    loaded = tp.load(folder)
    assert attachment_of(loaded).plan.stages[0].pruner.config() == attachment_of(model).plan.stages[0].pruner.config()
    assert all(torch.equal(w, after[n]) for n, w in attachment_of(loaded).pruners.state_dict().items())
    with torch.no_grad(), tp.record(loaded) as trace:
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-6)
    assert trace.stages[0].vision_out == [16, 16]
