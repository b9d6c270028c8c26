"""Counts live on the host: with one sample and fixed counts, no hook of ours asks the device for a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gating import Gating
from no_sync import NoSync
from support import answer_labels, batch, every_placed, tiny_model

from tpcompress.insertion import layer_arguments
from tpcompress.insertion.answers import _AnswersForward, answers
from tpcompress.insertion.attach import attach, detach, mode, record
from tpcompress.insertion.hooks import Hooks
from tpcompress.insertion.plan import PruningPlan, Stage

HOOKS = ("_core_pre", "_language_model_pre", "_language_model_post", "_layer_pre")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> NoSync:
    """Puts the guard around our hooks, and around nothing of transformers' own."""
    guard = NoSync()
    for name in HOOKS:
        inner = getattr(Hooks, name)

        def outer(self: Hooks, *args: Any, _inner: Any = inner) -> Any:
            with guard:
                return _inner(self, *args)

        monkeypatch.setattr(Hooks, name, outer)

    def layer_mask(*args: Any) -> Any:
        # Transformers looks at each mask that it is given. Only hidden tokens (mode `mask`) or sizes bring us here.
        guard.masks_made += 1
        guard.paused = True
        try:
            return make_mask(*args)
        finally:
            guard.paused = False

    make_mask = layer_arguments.layer_mask
    monkeypatch.setattr(layer_arguments, "layer_mask", layer_mask)
    return guard


@pytest.mark.parametrize("positions", ["compact", pytest.param("original", marks=pytest.mark.slow)])
@every_placed(2, 0)
def test_prefill_and_decode_never_wait(
    model: Any, guarded: NoSync, config: dict[str, Any], layer: int, positions: str
) -> None:
    never_waits(model, guarded, config, layer, True, positions)


@pytest.mark.parametrize("positions", ["original", pytest.param("compact", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("config", "layer"), [("uniform", 0), ("dart", 2), ("fastv", 2), ("merged", 0)])
def test_without_a_mask_nothing_waits(model: Any, guarded: NoSync, config: str, layer: int, positions: str) -> None:
    never_waits(model, guarded, {"type": config}, layer, False, positions)


def never_waits(
    model: Any, guarded: NoSync, config: dict[str, Any], layer: int, with_mask: bool, positions: str
) -> None:
    stages = [Stage("uniform", 0, keep_tokens=40)] * (layer > 0) + [Stage(config, layer, keep_tokens=9)]
    inputs = batch([(5, 2, 7)])
    if not with_mask:
        del inputs["attention_mask"]
    attach(model, PruningPlan(stages, positions=positions))
    labels = answer_labels(inputs)
    with torch.no_grad():
        for how in ("drop", "mask"):
            with mode(model, how):
                with record(model) as trace:
                    out = model(**inputs, use_cache=True)
                    model(**inputs, labels=labels)
                mask = None
                if with_mask:
                    mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
                place = torch.tensor([[inputs["input_ids"].shape[1]]])
                given = {"past_key_values": out.past_key_values, "attention_mask": mask, "position_ids": place}
                model(input_ids=torch.tensor([[7]]), **given)
            if how == "drop" and trace.stages[-1].selection.size_BV is None:
                assert guarded.masks_made == 0, "without fillers and sizes the kernel's own causal flag serves"
                continue
            assert guarded.masks_made > 0 or layer == 0  # whose hidden tokens are in the 2-D mask
            guarded.masks_made = 0
    assert guarded.seen > 100, "control: the hooks ran under the guard"


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_layouts_and_axes_of_position_do_not_wait(guarded: NoSync, family: str) -> None:
    """Separators, M-RoPE and DeepStack. Sizes of images are read where the encoder reads them, not in our hooks."""
    model = tiny_model(family)
    inputs = batch([(5, ["image", "wide"], 7)], family=family, config=model.config)
    stages = [Stage("uniform", 0, keep_tokens=40), Stage("divprune", 2, keep_tokens=9)]
    for positions in ("original", "compact"):
        attach(model, PruningPlan(stages, positions=positions))
        with torch.no_grad():
            out = model(**inputs, use_cache=True)
            model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)
        assert guarded.masks_made == 0
        detach(model)
    assert guarded.seen > 100, "control: the hooks ran under the guard"


@pytest.mark.parametrize("how", ["mask", "drop"])
def test_gates_do_not_wait(model: Any, guarded: NoSync, how: str) -> None:
    inputs = batch([(5, 2, 7)])
    stages = [Stage(Gating(), 0, keep_tokens=40), Stage(Gating(), 2, keep_tokens=9)]
    attach(model.train(), PruningPlan(stages), mode=how)
    out = model(**inputs, labels=answer_labels(inputs))
    out.loss.backward()
    assert guarded.masks_made == 0, "a bias needs no mask"
    assert guarded.seen > 100, "control: the hooks ran under the guard"


def test_a_known_number_of_answers_does_not_wait(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    guard = NoSync()
    inner = _AnswersForward.select

    def outer(self: _AnswersForward, *args: Any) -> Any:
        with guard:
            return inner(self, *args)

    monkeypatch.setattr(_AnswersForward, "select", outer)
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=9)]))
    inputs = batch([(5, 2, 7), (3, 1, 8)])
    with answers(model, num_answers=8):
        model(**inputs, labels=answer_labels(inputs))
    assert guard.seen > 5
    with answers(model), pytest.raises(AssertionError, match="wait"):
        model(**inputs, labels=answer_labels(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_cuda_sees_no_wait_either(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """CUDA's own judgement, which knows of plain copies from the host, too."""
    for name in HOOKS:
        inner = getattr(Hooks, name)

        def outer(self: Hooks, *args: Any, _inner: Any = inner) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return _inner(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(Hooks, name, outer)
    model = tiny_model(family).cuda()
    inputs = {k: v.cuda() for k, v in batch([(5, 2, 7)], family=family, config=model.config).items()}
    for positions in ("original", "compact"):
        attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=40), Stage("dart", 2, keep_tokens=9)], positions))
        with torch.no_grad():
            out = model(**inputs, use_cache=True)
            model(input_ids=torch.tensor([[7]]).cuda(), past_key_values=out.past_key_values)
        detach(model)


def test_the_guard_notices() -> None:
    x = torch.randn(3)
    with NoSync(), pytest.raises(AssertionError, match="wait"):
        x.sum().item()
    with NoSync(), pytest.raises(AssertionError, match="wait"):
        (x > 0).nonzero()
    with NoSync(), pytest.raises(AssertionError, match="wait"):
        x[x > 0]
    with NoSync():
        assert int(torch.tensor([1, 4]).max()) == 4
