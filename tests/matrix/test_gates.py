"""Gates inside the attention of every family: equal to plain products with a dense bias, in values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from exact import tolerance
from gating import Gating, dense
from structure import some
from subjects import Subject, ragged
from support import answer_labels, gradients

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind

QUICK = ("llava-clip_vision_model", "qwen2_5_vl", "gemma3", "paligemma-gemma2", "gemma4-small")
"""Plain, M-RoPE, windows and blocks, capped logits, shared keys."""

pytestmark = some(*QUICK)


def gated(subject: Subject, layer: int) -> int | None:
    """The layer at which this model can have gates; None if it has none, which attaching says."""
    parts = resolve(subject.base)
    layer = min(layer, parts.stage_layers[-1])
    kinds = {layer_kind(parts.text_config, i) for i in range(layer, len(parts.layers))}
    if kinds & set(RECURRENT):
        with pytest.raises(ValueError, match="which have no keys"):
            attach(subject.model, PruningPlan([Stage(Gating(), layer, keep_ratio=0.3)]))
        return None
    return layer


@pytest.mark.parametrize("layer", [0, 2])
def test_equal_to_a_dense_bias(subject: Subject, layer: int) -> None:
    model, base = subject.model, subject.base
    at = gated(subject, layer)
    if at is None:
        return
    inputs = subject.batch(*ragged(subject))
    labels, real = answer_labels(inputs), inputs["attention_mask"].bool()
    attach(model, PruningPlan([Stage(Gating(), at, keep_ratio=0.3)]), mode="mask")
    with record(model) as trace:
        out = model(**inputs, labels=labels)
    out.loss.backward()
    found = gradients(model)
    with dense(base, inputs, trace):
        expected = base(**inputs, labels=labels)
        expected.loss.backward()
    reference = gradients(base)
    plain = base(**inputs).logits.detach()
    assert out.logits.shape == expected.logits.shape
    assert (out.logits - expected.logits)[real].abs().max() < tolerance(model)
    assert (plain - expected.logits)[real].abs().max() > 0.05, "control: gates must change the logits"
    assert abs(out.loss - expected.loss) < tolerance(model)
    # Behind the stage nothing but the gates differs; before it the gates' own gradient joins.
    behind = [n for n in reference if n.startswith(f"{subject.family.layers}.{len(resolve(base).layers) - 1}.")]
    assert behind
    for name in behind:
        gap = (found[name] - reference[name]).abs().max() / reference[name].abs().max().clamp(min=1e-3)
        assert gap < 10 * tolerance(model), name
    assert found["token_pruners.0.weight"].abs().max() > 0, "the gates learn"


def test_gates_go_with_what_is_retained(subject: Subject) -> None:
    """In mode drop, on the shortened sequence."""
    model, base = subject.model, subject.base
    at = gated(subject, 2)
    if at is None:
        return
    inputs = subject.batch(*ragged(subject))
    attach(model, PruningPlan([Stage(Gating(slope=1.0), at, keep_ratio=0.3)]))
    with record(model) as trace, torch.no_grad():
        short = model(**inputs).logits
    if not subject.hides:
        # A window counts what is there: compared with a model in which nothing but the gates acts.
        detach(model)
        attach(model, PruningPlan([Stage(Gating(value=False, bias=False), at, keep_ratio=0.3)]))
        with torch.no_grad():
            assert (model(**inputs).logits - short)[:, -1].abs().max() > 1e-3
        return
    with dense(base, inputs, trace, hide=True), torch.no_grad():
        full = base(**inputs).logits
    assert short.shape[1] < full.shape[1]
    assert (short[:, -3:] - full[:, -3:]).abs().max() < tolerance(model)


def test_without_gates_the_kernel_is_the_models_own(subject: Subject) -> None:
    at = gated(subject, 0)
    if at is None:
        return
    model, inputs = subject.model, subject.batch(*ragged(subject))
    with torch.no_grad():
        expected = subject.base(**inputs).logits
        attach(model, PruningPlan([Stage(Gating(), at, keep_ratio=1.0)]))
        assert torch.equal(model(**inputs).logits, expected)
        other = copy.deepcopy(model)
        detach(model)
        assert torch.equal(model(**inputs).logits, expected)
        assert "forward" not in vars(resolve(model).layers[-1].self_attn)
        assert torch.equal(other(**inputs).logits, expected)
