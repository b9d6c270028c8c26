"""A fresh learned pruner is the training-free rule that it says it starts as."""

import pytest
import torch

from tpcompress.pruners import TokenView, create, list_pruners

LEARNED = [name for name in list_pruners() if create(name).untrained_equivalent is not None]


@pytest.mark.parametrize("name", LEARNED)
def test_it_starts_as_it_says(name):
    x = torch.randn(3, 36, 16, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(-1, keepdim=True)  # the scorer normalises each token first; centred tokens keep their angles
    view, count = TokenView.of(x, grid=(6, 6)), torch.tensor([7, 1, 20])
    pruner = create(name)
    pruner.build(16)
    fresh, rule = pruner.eval()(view, count), create(create(name).untrained_equivalent)(view, count)
    assert torch.equal(fresh.keep_BV, rule.keep_BV)
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(pruner(view, count).keep_BV, rule.keep_BV), "control: other weights choose otherwise"


def test_some_pruner_learns():
    assert "learned_gate" in LEARNED
