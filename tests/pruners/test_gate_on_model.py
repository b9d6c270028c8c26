"""A learned gate in a model: where training is inference, its logits are those of inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import answer_labels, batch, tiny_model

from tpcompress.insertion.attach import attach, detach, mode
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners.registry import list_parts

APPLIERS = list_parts("applier")
SAME_AT_FULL_LENGTH = {"gather", "gather_value", "log_bias", "merge", "rest"}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("applier", APPLIERS)
def test_training_loss_against_inference(model: Any, applier: str, layer: int) -> None:
    """Hard gates: equal in both modes, but where dropped tokens keep their share of the softmax."""
    inputs = batch([(5, 2, 7), (3, 1, 4)])
    inputs["labels"] = answer_labels(inputs)
    parts = {"scorer": {"type": "linear"}, "selector": {"type": "straight_through"}, "applier": {"type": applier}}
    torch.manual_seed(0)
    attach(model, PruningPlan([Stage({"type": "learned_gate", **parts}, layer, keep_tokens=20)]))
    losses = {}
    try:
        for how in ("drop", "mask"):
            for train in (False, True):
                model.train(train)
                with mode(model, how), torch.no_grad():
                    losses[how, train] = model(**inputs).loss.item()
        with mode(model, "mask" if APPLIERS[applier].full_length else "drop"):
            model(**inputs).loss.backward()
        gates = [p for name, p in model.named_parameters() if "token_pruners" in name]
        reached = [p.grad.abs().max().item() for p in gates if p.grad is not None]
    finally:
        detach(model)
        model.zero_grad()
    inference = losses["drop", False]
    assert losses["mask", False] == pytest.approx(inference, abs=1e-5)
    assert losses["drop", True] == pytest.approx(inference, abs=1e-5)
    gap = abs(losses["mask", True] - inference)
    assert gap < 1e-5 if applier in SAME_AT_FULL_LENGTH else gap > 1e-3
    assert gates
    assert bool(reached) == (applier != "gather"), "cutting alone tells a scorer nothing"
    assert not reached or max(reached) > 1e-7
