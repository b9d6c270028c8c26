"""Answers alone, around PEFT and tied heads, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import answer_labels, batch, generate, tiny_model

from tpcompress.insertion.answers import answers
from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage

SAMPLES = [(5, 1, 9), (3, 2, 8), (4, 0, 9)]
PLAN = PruningPlan([Stage("divprune", 0, keep_tokens=30), Stage("fastv", 2, keep_tokens=9)])


@pytest.mark.parametrize("head", ["plain", "modules_to_save", "lora on the head", "tied"])
@pytest.mark.parametrize("planned", [True, False])
def test_heads_of_all_kinds(head: str, planned: bool) -> None:
    model: Any = tiny_model()
    if head == "tied":
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    elif head != "plain":
        targets = ["q_proj", "lm_head"] if head == "lora on the head" else ["q_proj"]
        saved = ["lm_head"] if head == "modules_to_save" else None
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=saved))
    if planned:
        attach(model, PLAN)
    inputs = batch(SAMPLES)
    labels = answer_labels(inputs)
    whole = model(**inputs, labels=labels)
    with answers(model) as found:
        out = model(**inputs, labels=labels)
    assert out.logits.shape[:2] == (1, 12)
    assert abs(out.loss - whole.loss) < 1e-6 * whole.loss
    assert found.logits_AC is not None
    found.logits_AC.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_loss_knows_the_items_of_all_batches(model: Any) -> None:
    inputs = batch(SAMPLES)
    labels = answer_labels(inputs)
    with torch.no_grad():
        whole = model(**inputs, labels=labels, num_items_in_batch=48).loss
        with answers(model):
            assert abs(model(**inputs, labels=labels, num_items_in_batch=48).loss - whole) < 1e-6


def test_a_count_too_large_is_filled_up(model: Any) -> None:
    attach(model, PLAN)
    inputs = batch(SAMPLES)
    labels = answer_labels(inputs)
    with torch.no_grad():
        whole = model(**inputs, labels=labels).loss
        with answers(model, num_answers=15) as found, record(model) as trace:
            out = model(**inputs, labels=labels)
    assert found.targets_A is not None
    assert (found.targets_A == -100).sum() == 3
    assert abs(out.loss - whole) < 1e-6
    assert trace.labels_BN is not None
    assert (trace.labels_BN != -100).sum() == 12


def test_labels_of_the_manager_reach_the_stages(model: Any) -> None:
    """A rule that reads the prompt must not see an answer, however its labels came."""
    attach(model, PruningPlan([Stage("fastv", 2, keep_tokens=9)]))
    inputs = batch(SAMPLES)
    labels = answer_labels(inputs)
    with record(model) as trace, torch.no_grad():
        model(**inputs, labels=labels)
        with answers(model, labels):
            model(**inputs)
        model(**inputs)
    told, given, untold = (stage.retained_RV for stage in trace.stages)
    assert torch.equal(told, given)
    assert not torch.equal(told, untold), "control: without labels the last word is the answer's"


def test_text_alone(model: Any) -> None:
    attach(model, PLAN)
    inputs = batch([(5, 0, 9), (3, 0, 8)])
    inputs.pop("pixel_values", None)
    labels = answer_labels(inputs)
    with torch.no_grad():
        whole = model(**inputs, labels=labels).loss
        with answers(model) as found:
            assert abs(model(**inputs, labels=labels).loss - whole) < 1e-6
    assert found.hidden_AD is not None
    assert found.hidden_AD.shape[0] == 8


def test_what_is_refused(model: Any) -> None:
    attach(model, PLAN)
    inputs = batch(SAMPLES)
    expected = generate(model, inputs).sequences
    names = set(vars(model))
    with answers(model), torch.no_grad():
        with pytest.raises(ValueError, match="without labels"):
            model(**inputs)
        with pytest.raises(ValueError, match="leave logits_to_keep out"):
            model(**inputs, labels=answer_labels(inputs), logits_to_keep=3)
    assert set(vars(model)) == names
    assert torch.equal(generate(model, inputs).sequences, expected)
