"""A folder exported by version 0.1.0 still loads, verifies and answers as it did then.

`exported_by_0.1.0/` is a tiny random LLaVA with a learned gate before the language model, merging by token size at
layer 2, and compact positions; `exported_by_0.1.0_answers.safetensors` holds its logits and tokens, as 0.1.0 gave them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from export.helpers import answer, make_inputs
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import tpcompress as tp
from tpcompress.export import verify

OLD = Path(__file__).with_name("exported_by_0.1.0")
ANSWERS = OLD.with_name("exported_by_0.1.0_answers.safetensors")


def test_it_answers_as_it_did() -> None:
    then = load_file(ANSWERS)
    for model in (tp.load(OLD), AutoModelForImageTextToText.from_pretrained(OLD).eval()):
        logits, tokens = answer(model, make_inputs())
        assert torch.equal(tokens, then["tokens"])
        assert (logits - then["logits"]).abs().max() < 1e-4  # other CPUs round otherwise
        with tp.record(model) as trace, torch.no_grad():
            model(**make_inputs())
        assert [stage.vision_out for stage in trace.stages] == [[32, 32], [8, 8]]


def test_it_verifies() -> None:
    report = verify(OLD)
    assert report.ok, str(report)


def test_its_plan_is_read() -> None:
    plan = tp.plan_of(tp.load(OLD))
    assert [(stage.pruner.name, stage.layer, stage.keep_tokens) for stage in plan.stages] == [
        ("learned_gate", 0, 32),
        ("merged", 2, 8),
    ]
    assert plan.positions == "compact"
