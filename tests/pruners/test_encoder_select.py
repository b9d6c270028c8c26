"""FasterVLM, VisPruner, HoloV and HiPrune against slow versions of their formulas: loops, one sample, float64."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support import make_pruner, make_view, pad_view
from torch import Tensor

from tpcompress.pruners import TokenView, create
from tpcompress.pruners.hiprune import grid_neighbours, sequence_neighbours
from tpcompress.pruners.holov import allot, crop_scores, runs

D = 16


def view_for(config: dict[str, Any], B: int, V: int, grid: tuple[int, int] | None = None) -> TokenView:
    return make_view(make_pruner(config), torch.randn(B, V, D, generator=torch.Generator().manual_seed(2)), grid)


def kept(config: dict[str, Any], view: TokenView, *counts: int) -> list[list[int]]:
    keep_BV = create(config)(view, torch.tensor(counts)).keep_BV
    return [row.nonzero().flatten().tolist() for row in keep_BV]


def best(score: Any, count: int, of: Any = None) -> list[int]:
    """Places of the largest scores, ties to the earlier one."""
    return sorted(range(len(score)) if of is None else of, key=lambda i: (-float(score[i]), i))[: max(count, 0)]


def cosines(x: Tensor) -> np.ndarray:
    a = x.double().numpy()
    a = a / np.linalg.norm(a, axis=-1, keepdims=True)
    return a @ a.T


def peaky(view: TokenView, place: int) -> TokenView:
    """All attention on one token."""
    attention = torch.zeros_like(view.tower_cls_BLHV)
    attention[..., place] = 1.0
    return replace(view, tower_cls_BLHV=attention)


@pytest.mark.parametrize("source", ["class", "received"])
def test_fastervlm(source: str) -> None:
    config = {"type": "fastervlm", "attention": source}
    view = view_for(config, 3, 23)
    attention = view.tower_cls_BLHV if source == "class" else view.tower_received_BLHV
    assert (view.tower_cls_BLHV is None) == (source == "received")
    for k, rows in ((1, None), (7, None), (23, None)):
        rows = kept(config, view, k, k, k)
        assert rows == [sorted(best(a[0].double().mean(0), k)) for a in attention]


# --------------------------------------------------------------------------------------------------------- VisPruner


def naive_vispruner(a: Tensor, h: Tensor, k: int, important: float, step: int, compat: bool = False) -> list[int]:
    """Top floor(k important), at least one; then rounds of alternating sets until k - that many are left."""
    similar, first = cosines(h), best(a, max(int(k * important), min(1, int(important > 0 and not compat))))
    rest = [i for i in (best(a, len(a)) if compat else range(len(a))) if i not in first]
    while len(rest) > k - len(first):
        ours, others = rest[::2], rest[1::2]
        dup = {i: max((similar[i, j] for j in others), default=-2.0) for i in ours}
        many = min(step, len(rest) - (k - len(first)), len(ours))
        falling = sorted(ours, key=lambda i: -dup[i])
        rest = falling[many:] + others if compat else [i for i in rest if i not in falling[:many]]
    return sorted(first + rest)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(("important", "step"), [(0.5, 8), (0.5, 1), (0.5, 100), (0.0, 3), (0.3, 5), (1.0, 8)])
@pytest.mark.parametrize("V", [1, 2, 5, 23, 24])
def test_vispruner(V: int, important: float, step: int, compat: bool) -> None:
    config = {"type": "vispruner", "important": important, "step": step, "compat": compat}
    view = view_for(config, V, V)
    for b, row in enumerate(kept(config, view, *range(1, V + 1))):
        a, h = view.tower_cls_BLHV[b, 0].double().mean(0), view.tower_features_BLVD[b, 0]
        assert row == naive_vispruner(a, h, b + 1, important, step, compat)


@pytest.mark.parametrize(("V", "k"), [(575, 64), (576, 66), (576, 65), (576, 64)])
def test_vispruner_takes_odd_rests(V: int, k: int) -> None:
    """The official code fails where the two sets differ in size: 575 tokens, or 576 and a budget of 66."""
    view = view_for({"type": "vispruner"}, 1, V)
    (row,) = kept({"type": "vispruner"}, view, k)
    assert row == naive_vispruner(view.tower_cls_BLHV[0, 0].double().mean(0), view.tower_features_BLVD[0, 0], k, 0.5, 8)
    assert len(row) == k


def test_vispruner_of_official_order() -> None:
    """576 tokens and a budget of 64: dealt out by attention, other tokens are duplicates."""
    config = {"type": "vispruner", "compat": True}
    view = view_for(config, 1, 576)
    (row,) = kept(config, view, 64)
    a, h = view.tower_cls_BLHV[0, 0].double().mean(0), view.tower_features_BLVD[0, 0]
    assert row == naive_vispruner(a, h, 64, 0.5, 8, compat=True)
    assert kept(config, pad_view(view, 7, (1, 583)), 64) == [row]
    assert row != kept({"type": "vispruner"}, view, 64)[0], "control: the order decides"


def test_vispruner_of_padded_rows_and_equal_tokens() -> None:
    view = view_for({"type": "vispruner"}, 2, 23)
    alone = kept({"type": "vispruner"}, view, 6, 9)
    assert kept({"type": "vispruner"}, pad_view(view, 30, (1, 53)), 6, 9) == alone
    same = replace(view, tower_features_BLVD=torch.ones_like(view.tower_features_BLVD))
    assert [len(row) for row in kept({"type": "vispruner", "step": 3}, same, 6, 22)] == [6, 22]


def test_vispruner_of_repeated_tokens_does_not_depend_on_padding() -> None:
    """Tokens that repeat three times duplicate others to the last bit, which a round must not decide by rounding."""
    config = {"type": "vispruner", "important": 0.0, "step": 3}
    for n in range(8, 40):
        view = view_for(config, 2, n)
        repeated = view.tower_features_BLVD[:, :, torch.arange(n) // 3]
        view = replace(view, tower_features_BLVD=repeated)
        alone = kept(config, view, n // 3, n // 2)
        for padding in (1, 2, 5, 13):
            assert kept(config, pad_view(view, padding, (1, n + padding)), n // 3, n // 2) == alone


# ------------------------------------------------------------------------------------------------------------- HoloV


def naive_allot(score: list[float], size: list[int], count: int, rounds: int) -> list[int]:
    quota = [0] * len(score)
    for _ in range(rounds):
        room = [p for p in range(len(score)) if quota[p] < size[p]]
        left = count - sum(quota)
        weight = {p: Fraction(score[p]) for p in room}
        if not any(weight.values()):
            weight = dict.fromkeys(room, Fraction(1))
        share = {p: int(left * weight[p] / sum(weight.values())) for p in room}
        for p in sorted(room, key=lambda p: (-weight[p], p))[: left - sum(share.values())]:
            share[p] += 1
        quota = [min(quota[p] + share.get(p, 0), size[p]) for p in range(len(score))]
    return quota


def naive_holov(a: Tensor, h: Tensor, k: int, crops: int) -> list[int]:
    n, similar = len(a), cosines(h)
    members = [[o for o in range(n) if o * crops // n == p] for p in range(crops)]
    var = np.zeros(n)
    for crop in members:
        for i in crop:
            others = [similar[i, j] for j in crop if j != i]
            var[i] = np.var(others) if others else 0.0
    salient = 1e3 * a.double().numpy()
    token = salient + 0.09 * (salient.mean() / max(var.mean(), 1e-10)) * var
    score = [float(np.mean(token[crop])) if crop else 0.0 for crop in members]
    quota = naive_allot(score, list(map(len, members)), k, crops)
    return sorted(i for crop, q in zip(members, quota, strict=True) for i in best(a, q, crop))


@pytest.mark.parametrize(("V", "crops"), [(1, 16), (5, 16), (23, 4), (64, 16), (67, 16), (64, 1)])
def test_holov(V: int, crops: int) -> None:
    config = {"type": "holov", "crops": crops}
    view = view_for(config, V, V)
    for b, row in enumerate(kept(config, view, *range(1, V + 1))):
        a, h = view.tower_cls_BLHV[b, 0].mean(0), view.tower_features_BLVD[b, 0]
        assert row == naive_holov(a, h, b + 1, crops)
        assert len(row) == b + 1


def test_holov_passes_on_what_a_crop_cannot_hold() -> None:
    """With all attention in one crop of 36 the official allotment leaves 156 of 192 places to zero vectors."""
    view = peaky(view_for({"type": "holov"}, 1, 576, (24, 24)), 100)
    (official,) = kept({"type": "holov", "beta": 0.0, "compat": True}, view, 192)
    assert official == list(range(72, 108)), "the crop of token 100"
    (ours,) = kept({"type": "holov", "beta": 0.0}, view, 192)
    assert len(ours) == 192
    assert set(official) <= set(ours)
    crops = np.bincount(np.array(ours) // 36, minlength=16)
    assert sorted(crops)[:-1] == [10] * 9 + [11] * 6, "the others share the rest alike"
    assert [len(row) for row in kept({"type": "holov"}, view, 192)] == [192]


def test_allot_gives_all_that_there_is_room_for() -> None:
    g = torch.Generator().manual_seed(0)
    size = torch.randint(0, 9, (400, 16), generator=g)
    score = torch.rand(400, 16, generator=g) ** 8 * (torch.rand(400, 16, generator=g) > 0.4)
    score[:50] = 0.0
    score[50:100] = torch.randint(0, 3, (50, 16), generator=g).float()
    count = (torch.rand(400, generator=g) * (size.sum(1) + 4)).long()
    quota = allot(score, size, count, 16)
    assert torch.equal(quota.sum(1), count.minimum(size.sum(1)))
    assert ((quota >= 0) & (quota <= size)).all()
    for b in range(100):
        assert quota[b].tolist() == naive_allot(score[b].tolist(), size[b].tolist(), int(count[b]), 16)
        assert allot(score, size, count, 1)[b].tolist() == naive_allot(
            score[b].tolist(), size[b].tolist(), int(count[b]), 1
        )


def test_holov_parts() -> None:
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, [0, 5, 11]] = False
    index, real = runs(valid, 4)
    rows = [[index[b, p][real[b, p]].tolist() for p in range(4)] for b in range(2)]
    assert rows[0] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert rows[1] == [[1, 2, 3], [4, 6], [7, 8], [9, 10]]
    attention = torch.rand(2, 12)
    score = crop_scores(torch.ones(2, 12, 5), attention, index, real, 2.0, 7.0)
    assert torch.allclose(score[1, 1], 2 * attention[1, [4, 6]].double().mean()), "equal tokens have no variance"


# ----------------------------------------------------------------------------------------------------------- HiPrune


def naive_hiprune(middle: Tensor, deep: Tensor, places: list[tuple[int, int, int]], k: int, alpha: float) -> list[int]:
    """Anchors, their neighbours by place (tile, row, column), then the deep layer's best; in this order of rank."""
    anchors = best(middle, round(alpha * k / 5))
    around = [
        i
        for i, (t, r, c) in enumerate(places)
        if any((t, r + dr, c + dc) == places[j] for j in anchors for dr, dc in ((0, 1), (0, -1), (1, 0), (-1, 0)))
    ]
    around = [i for i in around if i not in anchors]
    rest = [i for i in range(len(places)) if i not in anchors + around]
    return sorted((best(deep, k, anchors) + best(deep, k, around) + best(deep, k, rest))[:k])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("grid", [(1, 1), (6, 9), (9, 6), (1, 23)])
def test_hiprune(grid: tuple[int, int], alpha: float) -> None:
    config, V = {"type": "hiprune", "alpha": alpha}, grid[0] * grid[1]
    view = view_for(config, V, V, grid)
    places = [(0, r, c) for r in range(grid[0]) for c in range(grid[1])]
    for b, row in enumerate(kept(config, view, *range(1, V + 1))):
        middle, deep = view.tower_received_BLHV[b].double().mean(1)
        assert row == naive_hiprune(middle, deep, places, b + 1, alpha)


def neighbours(kind: Any, view: TokenView, token: int) -> list[int]:
    near = kind(view, torch.tensor([[token]]))[0, 0].nonzero().flatten().tolist()
    assert kind is sequence_neighbours or token not in near, "clamped to an end, a place may be the token's own"
    return [i for i in near if i != token]


def test_neighbours_end_at_edges_tiles_and_gaps() -> None:
    view = TokenView.of(torch.zeros(1, 24, 2), (4, 6))
    assert neighbours(grid_neighbours, view, 8) == [2, 7, 9, 14]
    assert neighbours(grid_neighbours, view, 6) == [0, 7, 12]
    assert neighbours(grid_neighbours, view, 23) == [17, 22]
    tiles = replace(view, tile_BV=(view.row_BV >= 2).long())
    assert neighbours(grid_neighbours, tiles, 8) == [2, 7, 9]
    left = [0, 1, 8, 9, 14, 20]
    thin = replace(
        view, **{n: getattr(view, n)[:, left] for n in ("row_BV", "col_BV", "tile_BV", "image_BV", "valid_BV")}
    )
    assert neighbours(grid_neighbours, thin, 2) == [3, 4], "8 has lost its upper and left neighbours"


def test_official_neighbours_run_on_at_an_edge() -> None:
    """24 columns and the end of the first row: the official code takes the first token of the next row."""
    view = TokenView.of(torch.zeros(1, 576, 2), (24, 24))
    assert neighbours(sequence_neighbours, view, 23) == [0, 22, 24, 47]
    assert neighbours(sequence_neighbours, view, 0) == [1, 24]
    assert neighbours(sequence_neighbours, view, 575) == [551, 574]
    assert neighbours(grid_neighbours, view, 23) == [22, 47]
    config = {"type": "hiprune"}
    view = view_for(config, 1, 576, (24, 24))
    received = view.tower_received_BLHV.clone()
    received[:, 0, :, 23] = 1.0
    view = replace(view, tower_received_BLHV=received)
    (ours,), (official,) = kept(config, view, 64), kept(config | {"compat": True}, view, 64)
    assert {22, 23, 47} <= set(ours)
    assert {0, 22, 23, 24, 47} <= set(official)
    assert len(ours) == len(official) == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "fastervlm", "attention": "text"}, "fastervlm has no attention source 'text'; choose one of class"),
        ({"type": "vispruner", "important": 1.5}, "vispruner needs important between 0 and 1, got 1.5"),
        ({"type": "vispruner", "step": 0}, "got step 0"),
        ({"type": "holov", "crops": 0}, "holov needs crops >= 1"),
        ({"type": "hiprune", "alpha": -1}, "hiprune needs alpha between 0 and 1, got -1"),
    ],
)
def test_refuses_arguments(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(config)
