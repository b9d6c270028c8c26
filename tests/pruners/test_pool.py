"""Kernels of pooling against loops over the cells."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import check
from support import batch, make_pruner, make_view, pad_view
from torch import Tensor

from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.topk import grid_cells

ROWS, COLS, D = 5, 7, 8
V = ROWS * COLS
MERGING = ["mean", "gaussian", "max"]


def features(B: int = 1) -> Tensor:
    return torch.randn(B, V, D, generator=torch.Generator().manual_seed(1))


def cells_of(k: int) -> list[list[int]]:
    view = TokenView.of(torch.zeros(1, V, D), (ROWS, COLS))
    cell = grid_cells(view.row_BV, view.col_BV, view.valid_BV, torch.tensor([k]))[0].tolist()
    return [[v for v in range(V) if cell[v] == c] for c in range(k)]


def pooled(x: Tensor, members: list[int], kernel: str) -> Tensor:
    if kernel == "mean":
        return torch.stack([x[v] for v in members]).mean(0)
    if kernel == "max":
        return torch.tensor([max(float(x[v, d]) for v in members) for d in range(D)])
    place = [(v // COLS, v % COLS) for v in members]
    middle = [sum(p[axis] for p in place) / len(place) for axis in (0, 1)]
    far = [(r - middle[0]) ** 2 + (c - middle[1]) ** 2 for r, c in place]
    spread = sum(far) / len(far)
    weight = [math.exp(-d / (2 * spread)) if spread else 1.0 for d in far]
    return sum(w * x[v] for w, v in zip(weight, members, strict=True)) / sum(weight)


@pytest.mark.parametrize("kernel", MERGING)
@pytest.mark.parametrize("k", [1, 2, 4, 9, 13, 34, V])
def test_each_cell_becomes_one_token(kernel: str, k: int) -> None:
    x = features()
    selection = create({"type": "pool", "kernel": kernel})(TokenView.of(x, (ROWS, COLS)), torch.tensor([k]))
    kept = selection.keep_BV[0].nonzero().flatten().tolist()
    assert len(kept) == k
    for members in cells_of(k):
        (at,) = set(members) & set(kept)
        assert torch.allclose(selection.vision_BVD[0, at], pooled(x[0], members, kernel), atol=1e-5)


@pytest.mark.parametrize("kernel", MERGING)
def test_the_full_budget_changes_nothing(kernel: str) -> None:
    x = features()
    selection = create({"type": "pool", "kernel": kernel})(TokenView.of(x, (ROWS, COLS)), torch.tensor([V]))
    assert torch.equal(selection.vision_BVD, x)


def test_central_is_uniform_and_merges_nothing() -> None:
    pool, uniform = create({"type": "pool", "kernel": "central"}), create("uniform")
    assert not pool.merges
    view = TokenView.of(features(V), (ROWS, COLS))
    selection, expected = (pruner(view, torch.arange(1, V + 1)) for pruner in (pool, uniform))
    assert torch.equal(selection.keep_BV, expected.keep_BV)
    assert selection.vision_BVD is None


def test_kernels_differ_and_the_middle_weighs_more() -> None:
    values, view = {}, TokenView.of(features(), (ROWS, COLS))
    for kernel in MERGING:
        selection = create({"type": "pool", "kernel": kernel})(view, torch.tensor([4]))
        values[kernel] = selection.vision_BVD[selection.keep_BV]
    assert not torch.allclose(values["mean"], values["gaussian"], atol=1e-2)
    assert not torch.allclose(values["mean"], values["max"], atol=1e-2)
    spot = torch.zeros(1, 9, 1)
    spot[0, 4] = 1.0
    weighed = create({"type": "pool", "kernel": "gaussian"})(TokenView.of(spot, (3, 3)), torch.tensor([1]))
    assert float(weighed.vision_BVD[0, 4, 0]) > 1 / 9


@pytest.mark.parametrize("kernel", MERGING)
def test_padding_and_dtype(kernel: str) -> None:
    pruner = make_pruner({"type": "pool", "kernel": kernel})
    view, counts = make_view(pruner, features(3) - 5, (ROWS, COLS)), torch.tensor([1, 6, V])
    plain, padded = pruner(view, counts), pruner(pad_view(view, 4, (ROWS + 1, COLS + 2)), counts)
    assert torch.equal(padded.keep_BV[:, :V], plain.keep_BV)
    assert torch.allclose(padded.vision_BVD[:, :V], plain.vision_BVD, atol=1e-6)
    half = pruner(replace(view, vision_BVD=view.vision_BVD.bfloat16()), counts)
    assert half.vision_BVD.dtype == torch.bfloat16
    assert torch.equal(half.keep_BV, plain.keep_BV)


@pytest.mark.parametrize("kernel", MERGING)
def test_the_gradient_reaches_what_is_pooled(kernel: str) -> None:
    x = features().requires_grad_()
    selection = create({"type": "pool", "kernel": kernel})(TokenView.of(x, (ROWS, COLS)), torch.tensor([6]))
    selection.vision_BVD[selection.keep_BV].sum().backward()
    reached = (x.grad[0].abs().sum(-1) > 0).sum()
    assert reached == V if kernel != "max" else 6 < reached <= V
    assert torch.allclose(x.grad.sum(), torch.tensor(6.0 * D)), "each new value is made of its cell alone"


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="pool has no kernel 'median'; choose one of mean, gaussian, max, central"):
        create({"type": "pool", "kernel": "median"})


@pytest.mark.parametrize("kernel", [*MERGING, "central"])
def test_inside_a_model(model: Any, base: Any, kernel: str) -> None:
    plan = PruningPlan([Stage({"type": "pool", "kernel": kernel}, 0, keep_tokens=13)])
    assert PruningPlan.from_yaml(plan.to_yaml()).to_dict() == plan.to_dict()
    check(model, base, plan, batch([(5, 1, 7), (3, 2, 8)]))
