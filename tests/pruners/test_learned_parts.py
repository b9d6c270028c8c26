"""Learned gates inside combinators: the same tokens in training and inference, and a gradient that reaches the gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pruners.test_mmr import loop
from support import answer_labels, batch, gradients, make_pruner, make_view, tiny_model

import tpcompress as tp
from tpcompress.insertion.attach import attach, attachment_of, detach, mode
from tpcompress.insertion.attachment import requires_grad
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner, TokenView, create, list_pruners
from tpcompress.pruners.combinators import Composed
from tpcompress.pruners.gated import reordered
from tpcompress.pruners.merging import nearest_kept
from tpcompress.pruners.registry import list_parts
from tpcompress.pruners.topk import keep_topk, rank
from tpcompress.training.diagnostics.callback import estimators_of
from tpcompress.training.diagnostics.probe import random_selection

D, COUNTS = 16, torch.tensor([4, 9, 30])
OUTER = [name for name, cls in list_pruners().items() if issubclass(cls, Composed)]
APPLIERS = [name for name, cls in list_parts("applier").items() if not cls.merges]
MERGING = ("merged", "restore")


def composed(outer: str, applier: str = "noise", selector: str = "straight_through", **more: Any) -> dict[str, Any]:
    gate = {"type": "learned_gate", "scorer": "linear", "selector": selector, "applier": applier}
    if outer == "mix":
        return {"type": outer, "importance": gate, "uniqueness": "last_vision", **more}
    return {"type": outer, "pruner": gate, **more}


def view_of(pruner: Pruner, soft: bool = False) -> TokenView:
    x = torch.randn(3, 35, D, generator=torch.Generator().manual_seed(1))
    return make_view(pruner, x, (5, 7), soft=soft)


def test_reordered_scores_rank_by_place_and_keep_their_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 9, generator=g)
    scores[1] = 1.0  # equal scores
    scores.requires_grad_()
    valid = torch.arange(9).expand(2, 9) < torch.tensor([[9], [7]])
    place = rank(torch.randn(2, 9, generator=g), valid)
    new = reordered(scores, place, valid)
    assert torch.equal(rank(new.detach(), valid), place)
    assert torch.allclose(new[0].sort().values, scores[0].sort().values, atol=1e-3)
    (new * torch.arange(18.0).view(2, 9)).sum().backward()
    assert torch.equal(scores.grad, torch.arange(18.0).view(2, 9))


@pytest.mark.parametrize("applier", APPLIERS)
@pytest.mark.parametrize("outer", OUTER)
def test_training_retains_what_inference_retains(outer: str, applier: str) -> None:
    pruner = make_pruner(composed(outer, applier))
    assert pruner.learned
    assert pruner.differentiable
    expected = pruner.eval()(view_of(pruner), COUNTS)
    for soft in (False, True):
        found = pruner.train()(view_of(pruner, soft), COUNTS)
        assert torch.equal(found.keep_BV, expected.keep_BV), f"soft={soft}"
        gated = soft or pruner.trainable_when_cut
        carriers = [x for x in (found.vision_BVD, found.value_gate_BV, found.key_bias_BV) if x is not None]
        reached = any(x.requires_grad for x in carriers)
        assert reached == (gated and pruner.trains_through_model), f"soft={soft}"
        if found.gate_BV is not None:
            assert torch.allclose(found.gate_BV.sum(1), COUNTS.float(), rtol=1e-4)


def test_mmr_of_a_gate_is_mmr_of_its_scores() -> None:
    pruner = make_pruner(composed("mmr", alpha=0.6))
    view = view_of(pruner)
    scores = pruner.parts[0](view, COUNTS).scores_BV
    kept = pruner(view, COUNTS).keep_BV
    for b, k in enumerate(COUNTS.tolist()):
        assert sorted(loop(view.vision_BVD[b], scores[b], k, 0.6)) == kept[b].nonzero()[:, 0].tolist()


def test_window_and_quota_of_a_gate_are_those_of_its_ranking() -> None:
    gate = make_pruner({"type": "learned_gate", "scorer": "linear"})

    class Same(Pruner):
        name = "same"

        def forward(self, tokens: TokenView, num_keep_B: torch.Tensor) -> Any:
            chosen = gate(tokens, num_keep_B)
            return tp.Selection(keep_topk(chosen.scores_BV, tokens.valid_BV, num_keep_B), chosen.scores_BV)

    for outer in ("window", "quota"):
        cls = list_pruners()[outer]
        view = replace(view_of(gate), tile_BV=torch.arange(35).expand(3, -1) // 14)
        assert torch.equal(cls(gate)(view, COUNTS).keep_BV, cls(Same())(view, COUNTS).keep_BV)  # type: ignore[arg-type]


def test_values_of_groups_are_means_and_gates_act_on_them() -> None:
    """merged and size; noise off by a gate of value 1 on all retained tokens."""
    pruner = make_pruner(composed("merged", "value", proportional=True)).train()
    view = view_of(pruner, soft=True)
    found = pruner(view, COUNTS)
    group, _ = nearest_kept(view.vision_BVD, found.keep_BV, view.valid_BV, 30)
    for b in range(3):
        for v in found.keep_BV[b].nonzero()[:, 0].tolist():
            members = (group[b] == v).nonzero()[:, 0]
            assert torch.allclose(found.vision_BVD[b, v], view.vision_BVD[b, members].mean(0), atol=1e-5)
            assert found.size_BV[b, v] == len(members)
        assert (found.size_BV[b, ~found.keep_BV[b]] == 1).all()
    assert torch.equal(found.value_gate_BV.detach() > 0.5, found.keep_BV)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (composed("merged", "log_bias", proportional=True), True),
        (composed("merged", "gather", proportional=True), True),
        (composed("restore", "log_bias"), True),
        (composed("restore", "gather", anchors=0.0), True),
        (composed("mmr", "log_bias"), True),
        (composed("window", "gather_value"), True),
        (composed("mix", "log_bias"), True),
        (composed("merged", "noise", "soft_topk", proportional=True), False),
        (composed("mmr", "noise", "soft_topk"), False),
    ],
    ids=lambda x: f"{x['type']}-{x.get('pruner', x.get('importance'))['applier']}" if isinstance(x, dict) else str(x),
)
@pytest.mark.parametrize("layer", [0, 2])
def test_inside_a_model(model: Any, config: dict[str, Any], exact: bool, layer: int) -> None:
    """Hard gates that leave no share of the softmax: the loss in training is that of inference, sizes and all."""
    inputs = batch([(5, 2, 7), (3, 1, 4)])
    inputs["labels"] = answer_labels(inputs)
    torch.manual_seed(0)
    attach(model, PruningPlan([Stage(config, layer, keep_tokens=13)]))
    losses = {}
    try:
        cuts = attachment_of(model).pruners[0].trainable_when_cut
        for how in ("drop", "mask"):
            for train in (False, True):
                model.train(train)
                with mode(model, how), torch.no_grad():
                    losses[how, train] = model(**inputs).loss.item()
        for how in ("drop", "mask") if cuts else ("mask",):
            with mode(model.train(), how):
                model(**inputs).loss.backward()
            found = {name: g for name, g in gradients(model).items() if "token_pruners" in name}
            assert found
            assert any(g.abs().max() > 1e-7 for g in found.values()), how
            assert all(g.isfinite().all() for g in found.values())
            model.zero_grad()
    finally:
        detach(model)
        model.zero_grad()
    inference = losses["drop", False]
    assert losses["mask", False] == pytest.approx(inference, abs=1e-5)
    assert losses["drop", True] == pytest.approx(inference, abs=1e-5)
    assert (abs(losses["mask", True] - inference) < 2e-5) == exact


def test_controls_and_estimators_of_a_gate_inside() -> None:
    gate = {"type": "learned_gate", "applier": "gather"}
    assert create({"type": "merged", "pruner": gate, "proportional": True}).untrained_equivalent == {
        "type": "merged", "pruner": {"type": "novelty"}, "metric": "features", "weights": "mean", "proportional": True,
    }  # fmt: skip
    stages = [
        Stage({"type": kind, "pruner": {"type": "mmr", "pruner": gate} if kind == "merged" else gate}, 0, keep_tokens=9)
        for kind in ("merged", "mmr")
    ]
    assert [estimators_of(PruningPlan([stage])) for stage in stages] == [
        [("soft_topk", "merge")],
        [("soft_topk", "gather")],
    ]
    assert requires_grad(make_pruner(composed("merged")))


def test_the_random_control_of_diagnostics_merges_as_the_gate_does(model: Any) -> None:
    inputs = batch([(5, 2, 7)])
    stages = [Stage(composed("merged", proportional=True), 0, keep_tokens=13), Stage(composed("mmr"), 2, keep_tokens=9)]
    attach(model, PruningPlan(stages))
    try:
        own = list(attachment_of(model).pruners)
        with torch.no_grad(), tp.record(model.eval()) as trace, random_selection(model):
            model(**inputs)
            control = [pruner.config() for pruner in attachment_of(model).pruners]
        assert list(attachment_of(model).pruners) == own
    finally:
        detach(model)
    assert [config["type"] for config in control] == ["merged", "random"]
    assert control[0]["pruner"]["type"] == "random"
    assert control[0]["proportional"]
    assert [stage.vision_out for stage in trace.stages] == [[13, 13], [9, 9]]
    assert trace.stages[0].selection.size_BV.sum() > 26
