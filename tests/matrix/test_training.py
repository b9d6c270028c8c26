"""Training in every family: gradients, checkpointing, LoRA, copies, and a base that comes back as it was."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from exact import tolerance
from peft import LoraConfig, get_peft_model
from reference import Reference
from subjects import Subject
from support import answer_labels, generate, gradients, stir, tiny_model
from torch import Tensor, nn
from ways import ways

from tpcompress.families import resolve
from tpcompress.insertion.attach import ATTACHED, PRUNERS, attach, attachment_of, base_of, detach, mode, record
from tpcompress.insertion.plan import Stage
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind

STAGES = [Stage("divprune", 0, keep_ratio=0.6), Stage("uniform", 2, keep_ratio=0.3)]
SCORER = {"type": "local_global", "question": True, "width": 8}
GATE = [Stage({"type": "learned_gate", "scorer": SCORER}, 0, keep_ratio=0.3)]
SAMPLES: list[Any] = [(5, 1, 9), (4, 0, 7)]


def merging(subject: Subject) -> list[Stage]:
    """A stage that writes new values, and one that reads the attention of the layer before it."""
    parts = resolve(subject.base)
    layer = next(i for i in parts.stage_layers if i > 1 and layer_kind(parts.text_config, i - 1) not in RECURRENT)
    return [Stage("pool", 0, keep_ratio=0.5), Stage("fastv", layer, keep_ratio=0.2)]


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def backward(model: Any, inputs: dict[str, Any], **more: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    torch.manual_seed(7)  # noise of the gate
    loss = model(**inputs, labels=answer_labels(inputs), **more).loss
    loss.backward()
    return loss.item(), gradients(model)


def in_tower(subject: Subject, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the vision tower's own parameters."""
    return {n: g for n, g in found.items() if n.startswith(f"{subject.family.vision_tower}.")}


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()


# ------------------------------------------------------------------------------------------------------ gradients


@ways("drop training", plan="several")
def test_gradients_equal_those_of_the_reference(subject: Subject) -> None:
    model, base = subject.model.train(), subject.base.train()
    inputs = subject.batch(*SAMPLES, (3, 2, 8), (6, subject.kinds, 5))
    attach(model, subject.plan(STAGES))
    with record(model) as trace:
        _, found = backward(model, inputs)
    reference = Reference.of(trace, inputs, base)
    with reference.on(base, inputs):
        _, expected = backward(base, inputs)
    _, plain = backward(base, inputs)
    base.eval()
    assert found.keys() == expected.keys()
    gaps = {name: relative(found[name], expected[name]) for name in expected}
    name = max(gaps, key=lambda n: gaps[n])
    assert gaps[name] < 10 * tolerance(model), (name, gaps[name])
    assert max(relative(plain[n], expected[n]) for n in expected) > 0.05, "control: pruning changes gradients"
    assert any(g.abs().max() > 0 for g in in_tower(subject, found).values()), "the tower learns through the cut"
    assert in_tower(subject, found).keys() == in_tower(subject, plain).keys()


@pytest.mark.parametrize("name", ["drop", "gate"])
def test_checkpointing_gives_the_same_bits(subject: Subject, name: str) -> None:
    model = subject.model.train()
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{type(model).__name__} has no gradient checkpointing in transformers")
    inputs = subject.batch(*SAMPLES, (3, 2, 8))
    how, stages = ("drop", merging(subject)) if name == "drop" else ("mask", GATE)
    stir(attach(model, subject.plan(stages), mode=how))
    # Checkpointing goes without a cache, and layers that carry a state take another kernel with one.
    loss, plain = backward(model, inputs, use_cache=False)
    if name == "gate":
        scorer = {n: g for n, g in plain.items() if n.startswith(PRUNERS)}
        assert sum(g.abs().max() > 0 for g in scorer.values()) >= len(scorer) - 1  # a common offset has no effect
    broken = []
    for reentrant in (True, False):
        if reason := changed_by_checkpointing(model, inputs, reentrant, loss, plain):
            base = subject.base.train()
            without_us = changed_by_checkpointing(base, inputs, reentrant, *backward(base, inputs, use_cache=False))
            base.eval()
            assert without_us, reason
            broken.append(f"reentrant={reentrant}: {without_us}")
    if broken:
        pytest.skip(f"{type(model).__name__} of transformers, without a plan, {'; '.join(broken)}")


def changed_by_checkpointing(
    model: Any, inputs: dict[str, Any], reentrant: bool, loss: float, plain: dict[str, Tensor]
) -> str:
    """What differs from the same step without; empty if nothing does."""
    with checkpointed(model, reentrant):
        try:
            again, found = backward(model, inputs)
        except RuntimeError as error:  # out of autograd: the recomputed graph is not the one that was run
            gradients(model)
            return str(error).split(".")[0]
    assert found.keys() == plain.keys()
    odd = [name for name in plain if not torch.equal(found[name], plain[name])]
    return f"changes {len(odd)} of {len(plain)} gradients" if odd or again != loss else ""


@contextmanager
def checkpointed(model: Any, reentrant: bool) -> Iterator[None]:
    """Gradient checkpointing for a block. (The old name of a flag warns that it will go.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        yield
        model.gradient_checkpointing_disable()
        if reentrant:
            model.disable_input_require_grads()


# ----------------------------------------------------------------------------------------------------------- PEFT


def lora(subject: Subject, model: Any) -> Any:
    """Random LoRA on every linear layer inside the decoder layers."""
    parts = resolve(base_of(model))
    inside = {m for layer in parts.layers for m in layer.modules() if type(m) is nn.Linear}
    names = [name for name, module in model.named_modules() if module in inside]
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)).eval()


@pytest.mark.slow  # by default on LLaVA, in tests/insertion/test_attach.py
def test_lora_before_and_after(subject: Subject) -> None:
    inputs, plan = subject.batch(*SAMPLES), subject.plan(STAGES)
    before, after = copy.deepcopy(subject.base), copy.deepcopy(subject.base)
    plain = logits(before, inputs)
    pruned = logits(attach(before, plan), inputs)
    tuned, other = lora(subject, before), attach(lora(subject, after), plan)
    out = logits(tuned, inputs)
    assert out.shape == pruned.shape
    assert out.shape[1] < plain.shape[1]
    assert torch.equal(logits(other, inputs), out)
    assert (out - pruned).abs().max() > 1e-3, "control: the adapter matters"
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, inputs), pruned), "the training-free pruned model"
        with mode(tuned, "off"):
            assert torch.equal(logits(tuned, inputs), plain), "the teacher"
    found = [backward(m.train(), inputs)[1] for m in (tuned, other)]
    assert found[0].keys() == found[1].keys()
    assert all("lora_" in name and torch.equal(g, found[1][name]) for name, g in found[0].items())
    assert sum(g.abs().max() > 0 for g in found[0].values()) > len(found[0]) * 0.7  # not every expert gets tokens
    with mode(tuned.eval(), "off"):
        assert torch.equal(logits(detach(other.eval()), inputs), logits(tuned, inputs))
    merged = tuned.merge_and_unload()
    assert merged is before
    assert (logits(merged, inputs) - out).abs().max() < 10 * max(tolerance(merged), 1e-5)
    assert not any("lora" in name for name in merged.state_dict())
    detach(merged)
    assert logits(merged, inputs).shape == plain.shape
    assert ATTACHED not in vars(merged)


# --------------------------------------------------------------------------------------------------------- copies


def check_independent(original: Any, other: Any, inputs: dict[str, Any]) -> None:
    """Both prune with controllers of their own; detaching one leaves the other attached."""
    expected, tokens = logits(original, inputs), generate(original, inputs, new=2).sequences
    assert attachment_of(other).parts.model is other
    with record(other) as its, record(original) as ours:
        assert torch.equal(logits(other, inputs), expected)
        assert torch.equal(generate(other, inputs, new=2).sequences, tokens)
    assert its.stages
    assert not ours.stages
    labels = answer_labels(inputs)
    with torch.no_grad():
        assert torch.equal(other(**inputs, labels=labels).loss, original(**inputs, labels=labels).loss)
    with mode(original, "off"):
        assert torch.equal(logits(other, inputs), expected)
    detach(other)
    assert torch.equal(logits(original, inputs), expected)
    assert logits(other, inputs).shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.slow  # by default on LLaVA, in tests/insertion/test_attach.py
def test_deepcopy(subject: Subject) -> None:
    model, inputs = subject.model, subject.batch(*SAMPLES)
    attach(model, subject.plan(merging(subject)))
    check_independent(model, copy.deepcopy(model), inputs)
    other = copy.deepcopy(model)
    expected = logits(model, inputs)
    detach(model)
    assert torch.equal(logits(other, inputs), expected)


@pytest.mark.slow  # by default on LLaVA, in tests/insertion/test_attach.py
def test_save_and_load_of_the_whole_object(subject: Subject) -> None:
    # Unused so far: hooks that transformers adds in use cannot be pickled, with or without us.
    model = tiny_model(subject.case[0], *subject.case[1])
    attach(model, subject.plan(merging(subject)))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    check_independent(model, torch.load(stored, weights_only=False), subject.batch(*SAMPLES))


# --------------------------------------------------------------------------------------------------------- detach


def everything(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Any]:
    """What modules carry: classes, attributes, hooks, and the mode they are in."""
    found: dict[str, Any] = {}
    for name, module in modules:
        found[name] = (type(module), set(vars(module)), module.training)
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_pre_hooks_with_kwargs"):
            found[f"{name}.{hooks}"] = dict(getattr(module, hooks))
    return found


@ways("drop training", "drop decoding", plan="merging")
@ways("mask training", "drop decoding", plan="learned")
def test_detach_restores_the_base(subject: Subject) -> None:
    model, inputs = subject.model, subject.batch(*SAMPLES)
    generate(model, inputs, new=2)  # transformers puts hooks of its own in place at the first call
    expected, loss = logits(model, inputs), backward(model, inputs)
    before = everything(list(model.named_modules()))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for stages, how in ((merging(subject), "drop"), (GATE, "mask")):
        attach(model, subject.plan(stages), mode=how)
        assert {n for n in model.state_dict() if not n.startswith(PRUNERS)} == set(state)
        backward(model.train(), inputs)
        with mode(model.eval(), "drop"):
            generate(model, inputs, new=2)
        detach(model)
        assert everything(list(model.named_modules())) == before
    assert torch.equal(logits(model, inputs), expected)
    again = backward(model, inputs)
    assert again[0] == loss[0]
    assert all(torch.equal(again[1][name], g) for name, g in loss[1].items())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
