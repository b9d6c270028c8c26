"""Attach and detach: in place, once, reversible; copies and wrappers of the model prune on their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import answer_labels, batch, generate, gradients, tiny_model
from torch import nn

from tpcompress.insertion.attach import (
    ATTACHED,
    PRUNERS,
    attach,
    attachment_of,
    base_of,
    budgets,
    detach,
    mode,
    plan_of,
    record,
)
from tpcompress.insertion.plan import Budget, PruningPlan, Stage

SAMPLES = [(5, 1, 7), (3, 2, 8)]
PLAN = PruningPlan(
    [Stage("uniform", 0, keep_tokens=30), Stage("learned_gate", 1, keep_tokens=20), Stage("fastv", 3, keep_tokens=9)]
)


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def everything(model: nn.Module) -> dict[str, Any]:
    """What a model carries: attributes, hooks, modules."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (type(module), set(vars(module)), module.training)
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_pre_hooks_with_kwargs"):
            found[f"{name}.{hooks}"] = dict(getattr(module, hooks))
    return found


def test_attach_keeps_class_and_names_and_detach_everything(model: Any) -> None:
    inputs = batch(SAMPLES)
    generate(model, inputs)  # transformers puts hooks of its own in place at the first call
    expected = logits(model, inputs)
    before, state, cls = everything(model), {k: v.clone() for k, v in model.state_dict().items()}, type(model)
    signature = model._supports_mm_encoder_outputs()
    assert attach(model, PLAN) is model
    assert type(model) is cls
    assert plan_of(model) is PLAN
    names = set(model.state_dict())
    assert {n for n in names if not n.startswith(PRUNERS)} == set(state)
    assert any(n.startswith(f"{PRUNERS}.1.scorer") for n in names)
    assert model._supports_mm_encoder_outputs() == signature
    assert logits(model, inputs).shape != expected.shape
    generate(model, inputs)
    model(**inputs, labels=answer_labels(inputs)).loss.backward()
    model.zero_grad(set_to_none=True)
    assert detach(model) is model
    assert everything(model) == before
    assert torch.equal(logits(model, inputs), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_detach_restores_what_the_user_had_set() -> None:
    model: Any = tiny_model()

    def loss(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return logits.sum() * 0 + 3

    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs)

    inputs = batch([(5, 1, 7)])
    model.loss_function, model.forward = loss, forward
    attach(model, PLAN)
    assert model(**inputs, labels=answer_labels(inputs)).loss == 3
    detach(model)
    assert model.loss_function is loss
    assert model.__dict__["forward"] is forward


def test_attach_again_after_detach(model: Any) -> None:
    inputs = batch(SAMPLES)
    for keep in (9, 20):
        attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=keep)]))
        assert logits(model, inputs).shape[1] == 3 + 8 + 2 * 2 + 2 * keep
        detach(model)


def test_attached_twice_is_refused_and_harmless(model: Any) -> None:
    attach(model, PLAN)
    expected = logits(model, batch(SAMPLES))
    with pytest.raises(ValueError, match=r"already carries a plan \(.*\); call tpcompress.detach"):
        attach(model, PLAN)
    assert torch.equal(logits(model, batch(SAMPLES)), expected)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([Stage("uniform", 6, keep_tokens=3)], {}, r"Stage 0 acts at layer 6, but the model has 6 \(0 to 5\)"),
        (
            [Stage("fastv", 0, keep_tokens=3)],
            {},
            "'fastv' needs attention of the layer before.*set layer >= 1.*divprune",
        ),
        ([Stage("dart", 0, keep_tokens=3)], {}, "'dart' needs keys of the layer before"),
        (
            [Stage("uniform", 0, keep_tokens=3)],
            {"mode": "dorp"},
            "learn, got 'dorp'",
        ),
    ],
)
def test_refused_plans_leave_the_model_as_it_was(model: Any, stages: Any, options: Any, message: str) -> None:
    before = everything(model)
    with pytest.raises(ValueError, match=message) as error:
        attach(model, PruningPlan(stages), **options)
    assert "\n" not in str(error.value)
    assert everything(model) == before


def test_a_gate_of_another_width_is_refused(model: Any) -> None:
    stage = Stage("learned_gate", 0, keep_tokens=3)
    stage.pruner.build(8)
    with pytest.raises(ValueError, match="built for width 8, the model has 64"):
        attach(model, PruningPlan([stage]))
    assert not hasattr(model, ATTACHED)


def test_nothing_attached(model: Any) -> None:
    for call in (detach, plan_of, attachment_of):
        with pytest.raises(ValueError, match="No plan is attached"):
            call(model)
    with pytest.raises(ValueError, match="No plan is attached"), mode(model, "off"):
        pass
    with pytest.raises(TypeError, match="Expected a transformers model.*got Linear"):
        attach(nn.Linear(2, 2), PLAN)


def test_unknown_mode_and_restored_mode(model: Any) -> None:
    attach(model, PLAN, mode="mask")
    with pytest.raises(ValueError, match="got 'of'"), mode(model, "of"):
        pass
    with pytest.raises(RuntimeError), mode(model, "off"):
        raise RuntimeError
    assert attachment_of(model).settings.mode == "mask"


def test_the_inner_model_alone_is_pruned_and_forgets(model: Any, base: Any) -> None:
    """`model.model(...)` goes past the outermost forward; the next call must not find its state."""
    image, text = batch(SAMPLES), batch([(4, 0, 5)])
    attach(model, PLAN)
    with torch.no_grad():
        assert model.model(**image).last_hidden_state.shape[1] < image["input_ids"].shape[1]
        assert torch.equal(model.model(**text).last_hidden_state, base.model(**text).last_hidden_state)
        model.model(**image)
        with mode(model, "off"):
            assert torch.equal(model.model(**image).last_hidden_state, base.model(**image).last_hidden_state)


def test_plan_and_model_do_not_share_pruners(model: Any) -> None:
    attach(model, PLAN)
    assert not list(PLAN.stages[1].pruner.parameters())
    assert list(getattr(model, PRUNERS)[1].parameters())
    assert not any(p.training for p in getattr(model, PRUNERS))
    model.train()
    assert all(p.training for p in getattr(model, PRUNERS))
    model.eval()
    other = tiny_model().train()
    attach(other, PLAN)
    assert all(p.training for p in getattr(other, PRUNERS))


# -------------------------------------------------------------------------------------------------------- copies


def check_independent(original: Any, other: Any, expected: torch.Tensor) -> None:
    """The copy prunes with its own attachment, and changes to one do not reach the other."""
    inputs = batch(SAMPLES)
    tokens = generate(original, inputs).sequences
    assert attachment_of(other) is not attachment_of(original)
    assert attachment_of(other).parts.model is other
    with record(other) as its, record(original) as ours:
        assert torch.equal(logits(other, inputs), expected)
        assert generate(other, inputs).sequences.equal(tokens)
    assert its.stages
    assert not ours.stages
    labels = answer_labels(inputs)
    with torch.no_grad():
        assert torch.equal(other(**inputs, labels=labels).loss, original(**inputs, labels=labels).loss)
    with mode(original, "off"):
        assert torch.equal(logits(other, inputs), expected)
    with budgets(other, [Budget(keep_tokens=5)] * 3):
        assert torch.equal(logits(original, inputs), expected)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert torch.equal(logits(original, inputs), expected)
    detach(other)
    assert torch.equal(logits(original, inputs), expected)
    assert logits(other, inputs).shape[1] == inputs["input_ids"].shape[1]


def test_deepcopy(model: Any) -> None:
    attach(model, PLAN)
    expected = logits(model, batch(SAMPLES))
    check_independent(model, copy.deepcopy(model), expected)
    check_independent(model, copy.deepcopy(copy.deepcopy(model)), expected)


def test_save_and_load_of_the_whole_object(tmp_path: Path) -> None:
    model = tiny_model()  # unused so far: hooks that transformers adds in use cannot be pickled, with or without us
    attach(model, PLAN)
    torch.save(model, tmp_path / "model.pt")
    pickled = pickle.dumps(model)
    expected = logits(model, batch(SAMPLES))
    check_independent(model, torch.load(tmp_path / "model.pt", weights_only=False), expected)
    check_independent(model, pickle.loads(pickled), expected)


def test_state_dict_moves_between_attached_models(model: Any) -> None:
    attach(model, PLAN)
    other = tiny_model(seed=5)
    attach(other, PLAN)
    assert not torch.equal(logits(other, batch(SAMPLES)), logits(model, batch(SAMPLES)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch(SAMPLES)), logits(model, batch(SAMPLES)))


def test_save_pretrained_is_not_disturbed(model: Any, tmp_path: Path) -> None:
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=5)]))
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    with mode(model, "off"):
        assert torch.equal(logits(plain, batch(SAMPLES)), logits(model, batch(SAMPLES)))


def test_half_precision(model: Any) -> None:
    inputs = batch(SAMPLES)
    attach(model, PLAN)
    half = copy.deepcopy(model).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for how in ("drop", "mask"):
        with mode(half, how):
            assert logits(half, inputs).isfinite().all()
            assert generate(half, inputs).sequences.shape[0] == 2
    half.train()
    with mode(half, "mask"):
        half(**inputs, labels=answer_labels(inputs)).loss.backward()
    assert all(g.isfinite().all() for g in gradients(half).values())


# ---------------------------------------------------------------------------------------------------------- PEFT

LORA = {"r": 4, "target_modules": r".*language_model.*(q_proj|k_proj|v_proj)", "init_lora_weights": False}


@pytest.mark.parametrize("first", ["attach", "lora"])
def test_lora(first: str) -> None:
    inputs, plan = batch(SAMPLES), PruningPlan([Stage("pool", 0, keep_tokens=30), Stage("divprune", 3, keep_tokens=9)])
    base = tiny_model()
    plain = logits(base, inputs)
    if first == "attach":
        pruned = logits(attach(base, plan), inputs)
        tuned = get_peft_model(base, LoraConfig(**LORA)).eval()
    else:
        tuned = get_peft_model(base, LoraConfig(**LORA)).eval()
        assert attach(tuned, plan) is tuned
        with tuned.disable_adapter():
            pruned = logits(tuned, inputs)
    assert plan_of(tuned) is plan
    assert base_of(tuned) is base
    out = logits(tuned, inputs)
    assert out.shape == pruned.shape
    assert out.shape[1] < plain.shape[1]
    assert (out - pruned).abs().max() > 1e-3, "control: the adapter matters"
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, inputs), pruned), "the training-free pruned model"
        with mode(tuned, "off"):
            assert torch.equal(logits(tuned, inputs), plain), "the teacher"
    tuned.train()
    labels = answer_labels(inputs)
    loss = tuned(**inputs, labels=labels).loss
    loss.backward()
    found = gradients(tuned)
    assert found
    assert all("lora_" in n for n in found)
    assert all(g.isfinite().all() for g in found.values())
    tuned.eval()
    sequences = generate(tuned, inputs).sequences
    assert torch.equal(sequences, generate(tuned, inputs, use_cache=False).sequences)
    merged = tuned.merge_and_unload()
    assert merged is base
    assert (logits(merged, inputs) - out).abs().max() < 1e-4
    assert torch.equal(generate(merged, inputs).sequences, sequences)
    assert not any("lora" in n for n in merged.state_dict())
    detach(merged)
    assert logits(merged, inputs).shape == plain.shape
    assert ATTACHED not in vars(merged)


def test_lora_on_every_linear_layer_reaches_the_scorer_too() -> None:
    """With `all-linear` peft adapts the scorer as well; it stays trainable in that form, and merges."""
    base, inputs = tiny_model(), batch(SAMPLES)
    attach(base, PruningPlan([Stage("learned_gate", 0, keep_tokens=9)]), mode="mask")
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    tuned(**inputs, labels=answer_labels(inputs)).loss.backward()
    assert any("token_pruners" in n for n in gradients(tuned))
    tuned.eval()
    with mode(tuned, "drop"):
        out = logits(tuned, inputs)
        merged = tuned.merge_and_unload()
        assert (logits(merged, inputs) - out).abs().max() < 1e-3


def test_detach_through_the_wrapper() -> None:
    tuned = get_peft_model(tiny_model(), LoraConfig(**LORA)).eval()
    inputs = batch(SAMPLES)
    expected = logits(tuned, inputs)
    attach(tuned, PLAN)
    assert logits(tuned, inputs).shape != expected.shape
    detach(tuned)
    assert torch.equal(logits(tuned, inputs), expected)


def test_keep_everything_drops_nothing_with_lora() -> None:
    tuned = get_peft_model(tiny_model(), LoraConfig(**LORA)).eval()
    inputs = batch(SAMPLES)
    expected = logits(tuned, inputs)
    attach(tuned, PruningPlan([Stage("dart", 2, keep_ratio=1.0)]))
    assert torch.equal(logits(tuned, inputs), expected)
