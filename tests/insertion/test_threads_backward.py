"""The backward pass runs in other threads than the call, as on a GPU, where settings and calls are not visible."""

from __future__ import annotations

import threading

import pytest
import torch
from gating import Gating
from support import answer_labels, batch, gradients, tiny_model
from torch import Tensor

from tpcompress.insertion.attach import attach, attachment_of, budgets, mode
from tpcompress.insertion.plan import Budget, PruningPlan, Stage

PLANS = {
    "selected": [Stage("divprune", 0, keep_tokens=30), Stage("fastv", 2, keep_tokens=9)],
    "gated": [Stage(Gating(), 0, keep_tokens=30), Stage(Gating(), 2, keep_tokens=9)],
}
FEWER = [Budget(keep_tokens=20), Budget(keep_tokens=5)]


def backward(loss: Tensor, elsewhere: bool) -> None:
    """Run the backward pass here, or in a thread that has nothing of this context."""
    if not elsewhere:
        loss.backward()
        return
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("how", ["drop", "mask"])
@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "non-reentrant", "no checkpointing"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_checkpointed_layers_are_recomputed_elsewhere(family: str, plan: str, reentrant: bool | None, how: str) -> None:
    """Other budgets and another mode than those of `attach`, in a block that is over before the backward pass."""
    model = tiny_model(family)
    inputs = batch([(5, 1, 7), (4, 1, 6)], family=family, config=model.config)
    inputs["labels"] = answer_labels(inputs)
    attach(model.train(), PruningPlan(PLANS[plan]), mode="off")
    found = []
    for checkpointed, elsewhere in ((False, False), (True, False), (True, True)):
        model.zero_grad(set_to_none=True)
        if checkpointed and reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        with mode(model, how), budgets(model, FEWER):
            torch.manual_seed(0)
            loss = model(**inputs, use_cache=False).loss
        backward(loss, elsewhere)
        found.append((loss.detach(), gradients(model)))
        assert attachment_of(model).request is None
    (plain, expected), (here, ours), (there, theirs) = found
    assert torch.equal(plain, here)
    assert torch.equal(plain, there)
    assert ours.keys() == theirs.keys() >= expected.keys()
    assert all(torch.equal(ours[name], g) for name, g in theirs.items()), "the thread of the backward pass is no matter"
    assert all((ours[name] - g).abs().max() <= 1e-4 * (1 + g.abs().max()) for name, g in expected.items())
