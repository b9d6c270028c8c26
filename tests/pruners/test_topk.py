"""Budgets, soft top-k and cells of a grid."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tpcompress.pruners.selectors.relaxations import soft_topk
from tpcompress.pruners.topk import (
    cell_weights,
    central,
    grid_cells,
    keep_topk,
    rank,
    standardise,
)


def full_grid(h: int, w: int, B: int) -> tuple[Tensor, Tensor, Tensor]:
    token = torch.arange(h * w)
    return (token // w).expand(B, -1), (token % w).expand(B, -1), torch.ones(B, h * w, dtype=torch.bool)


@pytest.mark.parametrize("h", [pytest.param(h, marks=() if h < 6 else pytest.mark.slow) for h in range(1, 10)])
def test_no_cell_is_empty_and_cells_are_boxes(h: int) -> None:
    for w in range(1, 10):
        counts = torch.arange(1, h * w + 1)
        row, col, valid = full_grid(h, w, h * w)
        cells = grid_cells(row, col, valid, counts)
        for k, cell in zip(counts.tolist(), cells, strict=True):
            assert cell.unique().tolist() == list(range(k)), f"{k} cells on {h} x {w}"
            for c in range(k):
                rows, cols = row[0][cell == c].unique(), col[0][cell == c].unique()
                assert len(rows) * len(cols) == (cell == c).sum(), "a cell is not a box"
                assert rows.tolist() == list(range(rows[0], rows[-1] + 1))
                assert cols.tolist() == list(range(cols[0], cols[-1] + 1))


def test_cells_of_a_square_are_square() -> None:
    row, col, valid = full_grid(8, 8, 1)
    cell = grid_cells(row, col, valid, torch.tensor([16])).view(8, 8)
    expected = (torch.arange(8) // 2)[:, None] * 4 + torch.arange(8) // 2
    assert torch.equal(cell, expected)


def test_thinned_grid_becomes_runs_of_equal_length() -> None:
    row, col, valid = full_grid(4, 4, 1)
    keep = torch.tensor([1, 3, 4, 8, 9, 13, 15])
    cell = grid_cells(row[:, keep], col[:, keep], valid[:, keep], torch.tensor([3]))
    assert cell.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_grids_of_different_shape_in_one_batch() -> None:
    row, col, valid = (
        torch.zeros(2, 12, dtype=torch.long),
        torch.zeros(2, 12, dtype=torch.long),
        torch.ones(2, 12).bool(),
    )
    row[0], col[0], _ = (x[0] for x in full_grid(3, 4, 1))
    row[1, :4], col[1, :4], _ = (x[0] for x in full_grid(2, 2, 1))
    valid[1, 4:] = False
    cells = grid_cells(row, col, valid, torch.tensor([6, 3]))
    assert cells[0].unique().tolist() == list(range(6))
    assert cells[1, :4].unique().tolist() == list(range(3))


def test_cell_weights_and_centres() -> None:
    row, col, valid = full_grid(3, 3, 2)
    counts = torch.tensor([1, 3])
    cells = grid_cells(row, col, valid, counts)
    weight = cell_weights(cells, valid, counts)
    assert weight.shape == (2, 3, 9)
    assert torch.allclose(weight.sum(-1), torch.tensor([[1.0, 0, 0], [1, 1, 1]]))
    keep = central(cells, row, col, valid)
    assert keep[0].nonzero().flatten().tolist() == [4], "the middle of 3 x 3"
    assert keep.sum(1).tolist() == [1, 3]


def test_centre_ties_go_to_the_earlier_token() -> None:
    row, col, valid = full_grid(2, 2, 1)
    assert central(grid_cells(row, col, valid, torch.tensor([1])), row, col, valid).tolist() == [[True, *[False] * 3]]


@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_centres_are_exact_for_every_count(padding: int) -> None:
    """Against fractions, cell by cell; padding changes nothing."""
    for rows, cols in ((3, 5), (8, 8), (7, 12)):
        row, col, valid = full_grid(rows, cols, 1)
        row, col, valid = (torch.nn.functional.pad(x, (0, padding)) for x in (row, col, valid))
        for count in range(1, rows * cols + 1, 3):
            cells = grid_cells(row, col, valid, torch.tensor([count]))
            expected = []
            for cell in range(count):
                members = [v for v in range(rows * cols) if cells[0, v] == cell]
                mean = [Fraction(sum(int(x[0, v]) for v in members), len(members)) for x in (row, col)]
                away = [(int(row[0, v]) - mean[0]) ** 2 + (int(col[0, v]) - mean[1]) ** 2 for v in members]
                expected.append(members[away.index(min(away))])
            assert central(cells, row, col, valid)[0].nonzero().flatten().tolist() == sorted(expected)


def test_keep_topk_ties_and_padding() -> None:
    scores = torch.tensor([[1.0, 2, 2, 2, 0], [9, 9, 1, 1, 1]])
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    assert keep_topk(scores, valid, torch.tensor([2, 2])).tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert rank(scores, valid)[0].tolist() == [3, 0, 1, 2, 4]


def test_keep_topk_of_infinite_scores() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.0, -torch.inf]])
    valid = torch.tensor([[False, True, True, True]])
    assert keep_topk(scores, valid, torch.tensor([3])).tolist() == [[0, 1, 1, 1]]


def test_standardise_reads_valid_tokens_only() -> None:
    scores = torch.tensor([[1.0, 3, 1000], [5, 5, 5]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    out = standardise(scores, valid)
    assert torch.allclose(out, torch.tensor([[-1.0, 1, 0], [0, 0, 0]]), atol=1e-4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_soft_topk_sums_to_the_budget(scale: float) -> None:
    scores = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)) * scale
    valid = torch.ones(9, 9, dtype=torch.bool)
    valid[3, 5:] = False
    counts = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9])
    weight = soft_topk(scores, valid, counts)
    assert torch.allclose(weight.sum(1), counts.float(), rtol=1e-4)
    assert (weight[3, 5:] == 0).all()
    assert ((weight >= 0) & (weight <= 1)).all()
    order = scores[0].argsort()
    assert (weight[0][order].diff() >= 0).all(), "weights must rank like scores"


def test_soft_topk_gradient_equals_finite_differences() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 7, generator=g, dtype=torch.float64).requires_grad_()
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 4:] = False
    counts = torch.tensor([2, 3, 6])
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, valid, counts), scores, eps=1e-5, atol=1e-5)
    soft_topk(scores, valid, counts).sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-9, "the sum is fixed, so it has no gradient"


def test_soft_topk_tends_to_the_hard_choice() -> None:
    scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    valid, counts = torch.ones(4, 12, dtype=torch.bool), torch.tensor([1, 4, 7, 12])
    assert torch.equal(soft_topk(scores / 1e-3, valid, counts) > 0.5, keep_topk(scores, valid, counts))
