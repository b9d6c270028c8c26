"""Training of LLaVA: nothing of the answer in the choice of tokens. Gradients are tests/matrix/test_training.py."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import (
    PLACEHOLDER,
    answer_labels,
    batch,
    every_placed,
    generate,
    gradients,
    stir,
    tiny_model,
)

from tpcompress.insertion.attach import attach, mode, record
from tpcompress.insertion.plan import PruningPlan, Stage

ASKING = {"type": "learned_gate", "scorer": {"type": "local_global", "question": True}}
SAMPLES = [(5, 1, 9), (3, 2, 8), (4, 0, 9)]
SETUPS = {
    "mask": ("mask", [Stage("divprune", 0, keep_tokens=30), Stage("dart", 3, keep_tokens=11)]),
    "gate inside": ("mask", [Stage("learned_gate", 2, keep_tokens=11)]),
}


@pytest.fixture
def trained() -> Any:
    return tiny_model().train()


def backward(model: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(7)  # noise of the gate, dropout
    loss = model(**inputs, labels=answer_labels(inputs)).loss
    loss.backward()
    return loss.item(), gradients(model)


def checkpoint(model: Any, reentrant: bool | None) -> None:
    """Turn gradient checkpointing on or off; its old name warns that it will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if reentrant is None:
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("name", SETUPS)
def test_checkpointing_gives_the_same_bits(trained: Any, name: str) -> None:
    how, stages = SETUPS[name]
    inputs = batch(SAMPLES)
    stir(attach(trained, PruningPlan(stages), mode=how))
    loss, plain = backward(trained, inputs)
    assert any(g.abs().max() > 0 for n, g in plain.items() if "vision_tower" in n), "the tower learns through the cut"
    if "gate" in name:
        scorer = {n: g for n, g in plain.items() if "token_pruners" in n}
        assert scorer
        assert sum(g.abs().max() > 0 for g in scorer.values()) >= len(scorer) - 1  # a common offset has no effect
    for reentrant in (True, False):
        checkpoint(trained, reentrant)
        if reentrant:
            trained.enable_input_require_grads()
        again, found = backward(trained, inputs)
        checkpoint(trained, None)
        assert again == loss
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[n], plain[n]) for n in plain)


@every_placed(2, 0)
def test_training_and_inference_retain_the_same_tokens(model: Any, config: dict[str, Any], layer: int) -> None:
    """With the answer appended and labelled, and at generation without it. Left padding, so that prompts agree."""
    prompt = batch(SAMPLES)
    answer = torch.randint(3, 90, (len(SAMPLES), 4), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([prompt["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), answer], 1)
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(answer)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    row = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": prompt["pixel_values"]}
    attach(model, PruningPlan([Stage(config, layer, keep_tokens=9)]))
    with record(model) as inference:
        generate(model, prompt, new=2)
    for how in ("drop", "mask"):
        for training in (False, True):
            model.train(training)
            with mode(model, how), record(model) as trace, torch.no_grad():
                model(**row, labels=labels)
            selected = trace.stages[0].selection.keep_BV
            assert torch.equal(selected, inference.stages[0].selection.keep_BV), (how, training)
    model.eval()


@every_placed(0, 2)
def test_answers_never_change_the_retained_tokens(model: Any, config: dict[str, Any], layer: int) -> None:
    stir(attach(model, PruningPlan([Stage(config, layer, keep_tokens=9)])))
    for side in ("left", "right"):
        inputs = batch(SAMPLES, side)
        labels = answer_labels(inputs)
        other = dict(inputs)
        other["input_ids"] = torch.where(labels != -100, (inputs["input_ids"] + 17) % 90 + 3, inputs["input_ids"])
        assert (other["input_ids"] == PLACEHOLDER).equal(inputs["input_ids"] == PLACEHOLDER)
        with record(model) as trace, torch.no_grad():
            model(**inputs, labels=labels)
            model(**other, labels=answer_labels(other))
            model(**other)
        first, second, unlabelled = (stage.retained_RV for stage in trace.stages)
        assert torch.equal(first, second), side
        if config == {"type": "fastv"}:
            assert not torch.equal(second, unlabelled), "control: without labels the last token is the answer's"


@pytest.mark.parametrize(
    "config",
    [{"type": "fastv"}, {"type": "dart", "vision_pivots": 1}, ASKING],
)
def test_the_question_does_change_the_retained_tokens(model: Any, config: dict[str, Any]) -> None:
    """The control of the test above."""
    inputs = batch(SAMPLES)
    labels = answer_labels(inputs)
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, -8:-4] = (inputs["input_ids"][:, -8:-4] + 17) % 90 + 3
    stir(attach(model, PruningPlan([Stage(config, 2, keep_tokens=9)])))
    with record(model) as trace, torch.no_grad():
        model(**inputs, labels=labels)
        model(**other, labels=labels)
    assert not torch.equal(trace.stages[0].retained_RV, trace.stages[1].retained_RV)


def test_learned_gate_trains_at_full_length_and_infers_short(trained: Any) -> None:
    inputs = batch(SAMPLES)
    full = inputs["input_ids"].shape[1]
    attach(trained, PruningPlan([Stage("learned_gate", 0, keep_tokens=11)]), mode="mask")
    with record(trained) as trace:
        out = trained(**inputs, labels=answer_labels(inputs))
    gate = trace.stages[0].selection.gate_BV
    assert gate is not None
    assert torch.allclose(gate.sum(1), torch.tensor(11.0), rtol=1e-3)
    assert out.logits.shape[1] == full
    trained.eval()
    with mode(trained, "drop"), torch.no_grad():
        assert trained(**inputs).logits.shape[1] < full
    with torch.no_grad():
        hidden = trained(**inputs).logits
    with mode(trained, "off"), torch.no_grad():
        plain = trained(**inputs).logits
    assert hidden.shape[1] == full
    assert (hidden - plain)[:2, -4:].abs().max() > 0.05, "in evaluation `mask` hides what is not kept"


def test_a_few_steps_lower_the_loss(trained: Any) -> None:
    inputs = batch(SAMPLES)
    attach(trained, PruningPlan([Stage("learned_gate", 0, keep_tokens=11)]), mode="mask")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        out = trained(**inputs, labels=answer_labels(inputs))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_an_exception_leaves_nothing_behind(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=9)]))
    expected = generate(model, inputs).sequences
    wider = {k: torch.cat([inputs[k], inputs[k][:, -1:].expand(-1, 99)], 1) for k in ("input_ids", "attention_mask")}
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="do not match"):
        model(**wider, pixel_values=pixels)
    with pytest.raises(ValueError, match="do not match"):
        model(**inputs | {"pixel_values": pixels})
    assert torch.equal(generate(model, inputs).sequences, expected)
