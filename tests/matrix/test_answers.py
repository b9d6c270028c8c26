"""The head on answers alone, in every family: loss and gradients of the whole path, and no other row computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import tolerance
from structure import some
from subjects import Subject, ragged
from support import answer_labels, gradients
from torch import Tensor

from tpcompress.insertion.answers import answers
from tpcompress.insertion.attach import attach, mode
from tpcompress.insertion.plan import PruningPlan, Stage

QUICK = ("llava-clip_vision_model", "qwen2_5_vl", "aya_vision", "gemma4-small", "paligemma-gemma2")
"""Plain, M-RoPE, logits with a scale, and two that cap them."""

pytestmark = some(*QUICK)


def step(model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Any, dict[str, Tensor], list[int]]:
    """Output and gradients of one step, and how many rows the head saw."""
    rows: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: rows.append(out[..., 0].numel()))
    out = model(**inputs, labels=labels)
    out.loss.backward()
    handle.remove()
    return out, gradients(model), rows


@pytest.mark.parametrize("how", ["drop", "mask", "off", "no plan"])
def test_loss_and_gradients_are_those_of_the_whole_path(subject: Subject, how: str) -> None:
    model, inputs = subject.model, subject.batch(*ragged(subject))
    labels = answer_labels(inputs)
    labels[0, -2] = -100  # answers with a gap, and of unequal lengths
    A = int((labels != -100).sum())
    if how == "mask" and not subject.hides:
        stages = [Stage("learned_gate", 0, keep_ratio=0.4)]  # hides nothing
        model.train()
    else:
        stages = [Stage("divprune", 0, keep_ratio=0.6), Stage("uniform", 2, keep_ratio=0.3)]
    if how != "no plan":
        attach(model, subject.plan(stages), mode=how)
    torch.manual_seed(3)
    whole, expected, all_rows = step(model, inputs, labels)
    torch.manual_seed(3)
    with answers(model) as found:
        out, gradient, rows = step(model, inputs, labels)
    torch.manual_seed(3)
    assert rows == [A]
    assert all_rows[0] > 4 * A, "control: without, the head runs on everything"
    assert abs(out.loss - whole.loss) < 1e-6 * max(1.0, whole.loss.item())
    assert gradient.keys() == expected.keys()
    gaps = {n: ((gradient[n] - g).abs().max() / g.abs().max().clamp(min=1e-3)).item() for n, g in expected.items()}
    assert max(gaps.values()) < tolerance(model), max(gaps, key=lambda n: gaps[n])
    assert found.logits_AC is not None
    assert found.hidden_AD is not None
    assert found.targets_A is not None
    assert found.targets_A.tolist() == labels[labels != -100].tolist()
    assert found.sample_A is not None
    assert found.sample_A.tolist() == (labels != -100).nonzero()[:, 0].tolist()
    # With left padding and answers at the end, the rows in question end where the whole sequence does.
    places = [(b, s - 1 - labels.shape[1]) for b, s in (labels != -100).nonzero().tolist()]
    picked = torch.stack([whole.logits[b, s] for b, s in places])
    assert (found.logits_AC - picked).abs().max() < tolerance(model)
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == whole.logits.shape[:2], "afterwards all is as before"


def test_labels_of_the_manager_and_a_known_count(subject: Subject) -> None:
    model, inputs = subject.base, subject.batch((5, 1, 7), (4, 0, 9))
    labels = answer_labels(inputs)
    with torch.no_grad():
        whole = model(**inputs, labels=labels)
        with answers(model, labels, num_answers=8) as found:
            out = model(**inputs)
    assert found.logits_AC is not None
    assert found.logits_AC.shape[0] == 8
    assert torch.equal(out.logits[0], found.logits_AC)
    assert abs(out.loss - whole.loss) < 1e-6 * max(1.0, whole.loss.item())


def test_mode_off_and_the_base_agree(subject: Subject) -> None:
    """The teacher in the model itself, and a frozen copy."""
    model, base, inputs = subject.model, subject.base, subject.batch((5, 1, 7), (4, 0, 9))
    labels = answer_labels(inputs)
    attach(model, PruningPlan([Stage("uniform", 0, keep_ratio=0.3)]))
    with torch.no_grad(), mode(model, "off"), answers(model) as ours, answers(base) as its:
        model(**inputs, labels=labels)
        base(**inputs, labels=labels)
    assert ours.logits_AC is not None
    assert its.logits_AC is not None
    assert torch.equal(ours.logits_AC, its.logits_AC)
