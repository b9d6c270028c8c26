"""Windows and quotas: equal or proportional shares of groups of tokens, against loops over one row."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import batch, make_pruner, make_view
from torch import Tensor

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner, TokenView
from tpcompress.pruners.combinators import place_inside, places, quotas
from tpcompress.pruners.window import windows

D = 16
INNER = ["fastv", "novelty", "divprune", "dart", "uniform", "random"]


def features(B: int, V: int, seed: int = 0) -> Tensor:
    return torch.randn(B, V, D, generator=torch.Generator().manual_seed(seed))


def view_over(pruner: Pruner, grid: tuple[int, int], B: int = 3, **fields: Tensor) -> TokenView:
    return replace(make_view(pruner, features(B, grid[0] * grid[1]), grid), **fields)


def kept_of(keep_V: Tensor) -> set[int]:
    return set(keep_V.nonzero().flatten().tolist())


def tiles_view(sizes: list[tuple[int, int]], left: Tensor | None = None) -> TokenView:
    """Rectangles on top of each other, as the tiles of an image lie; of a thinned row, what is left."""
    cells = [
        (top, r, c, t)
        for t, (h, w) in enumerate(sizes)
        for top in [sum(s[0] for s in sizes[:t])]
        for r in range(h)
        for c in range(w)
    ]
    table = torch.tensor([(top + r, c, t) for top, r, c, t in cells])
    table = table if left is None else table[left]
    row, col, tile = table.T[:, None]
    valid = torch.ones_like(row, dtype=torch.bool)
    return TokenView(
        torch.zeros(1, len(table), 2), valid, row, col, tile, tile, (int(row.max()) + 1, int(col.max()) + 1)
    )


# --------------------------------------------------------------------------------------------------------- helpers


def test_places_sort_by_key_then_place() -> None:
    g = torch.Generator().manual_seed(0)
    place = torch.stack([torch.randperm(40, generator=g) for _ in range(3)])
    key = torch.randint(0, 5, (3, 40), generator=g)
    found = places(key, place)
    for b in range(3):
        order = sorted(range(40), key=lambda v: (int(key[b, v]), int(place[b, v])))
        assert [int(found[b, v]) for v in order] == list(range(40))


def test_place_inside_counts_per_group() -> None:
    group = torch.tensor([[7, 2, 7, 2, 2, 0, 9]])
    place = torch.tensor([[3, 5, 0, 1, 2, 4, 6]])
    valid = torch.tensor([[True] * 6 + [False]])
    inside, number = place_inside(place, group, valid)
    assert inside[0, :6].tolist() == [1, 2, 0, 0, 1, 0]
    assert number.tolist() == [[2, 1, 2, 1, 1, 0, 3]]


def shares(sizes: list[int], k: int, share: str) -> list[int]:
    """Ties go to the earlier group, whose next token is better in the test below."""
    if share == "proportional":
        given = [k * size // sum(sizes) for size in sizes]
        left = sorted(range(len(sizes)), key=lambda g: (-(k * sizes[g] % sum(sizes)), g))[: k - sum(given)]
        return [n + (g in left) for g, n in enumerate(given)]
    given = [0] * len(sizes)
    for _ in range(k):
        given[min((g for g in range(len(sizes)) if given[g] < sizes[g]), key=lambda g: (given[g], g))] += 1
    return given


@pytest.mark.parametrize("share", ["equal", "proportional"])
@pytest.mark.parametrize("sizes", [[5], [4, 4, 4], [1, 9, 3], [2, 2, 40, 7, 1], [17, 5]])
def test_quotas_at_every_budget(share: str, sizes: list[int]) -> None:
    V = sum(sizes)
    group = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    place = torch.arange(V)  # earlier groups are better, so that ties go to them
    selection = quotas(
        place.expand(V, V), group.expand(V, V), torch.ones(V, V, dtype=torch.bool), torch.arange(1, V + 1), share
    )
    for k in range(1, V + 1):
        counts = Counter(group[selection.keep_BV[k - 1]].tolist())
        given = [counts[g] for g in range(len(sizes))]
        assert given == shares(sizes, k, share)
        assert sum(given) == k
        if share == "proportional":
            assert all(abs(n - k * size / V) < 1 for n, size in zip(given, sizes, strict=True))
        else:
            assert all(n >= min(size, k // len(sizes)) for n, size in zip(given, sizes, strict=True))


# --------------------------------------------------------------------------------------------------------- windows


def test_windows_cut_each_tile_by_itself() -> None:
    sizes = [(6, 4), (3, 5), (1, 2)]
    window = windows(tiles_view(sizes), 2, 2)[0].tolist()
    cells = [(t, r, c, h, w) for t, (h, w) in enumerate(sizes) for r in range(h) for c in range(w)]
    assert window == [(t * 2 + r * 2 // h) * 2 + c * 2 // w for t, r, c, h, w in cells]
    assert Counter(window[:24]) == {0: 6, 1: 6, 2: 6, 3: 6}


def test_windows_of_a_thinned_row_number_no_more_tiles_than_tokens() -> None:
    left = torch.tensor([23, 30, 40])  # the last token of tile 1, and two of tile 2
    window = windows(tiles_view([(3, 4), (3, 4), (5, 5)], left), 4, 4)[0]
    assert window[0] < 16 <= window[1] < window[2] < 32


@pytest.mark.parametrize("inner", INNER)
def test_one_window_is_the_inner_rule(inner: str) -> None:
    window, plain = make_pruner({"type": "window", "pruner": inner, "rows": 1, "cols": 1}), make_pruner({"type": inner})
    view = view_over(window, (5, 7))
    for k in (1, 6, 20, 35):
        assert torch.equal(window(view, torch.full((3,), k)).keep_BV, plain(view, torch.full((3,), k)).keep_BV)


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (2, 3), (9, 9)])
def test_window_fastv(rows: int, cols: int) -> None:
    """As many of each window as of any other, by attention; the last incomplete round by attention, too."""
    pruner = make_pruner({"type": "window", "rows": rows, "cols": cols})
    view = view_over(pruner, (8, 6))
    score = view.attention_BHV.mean(1)
    for k in (1, 5, 16, 17, 40, 48):
        keep = pruner(view, torch.full((3,), k)).keep_BV
        for b in range(3):
            queues: dict[tuple[int, int], list[int]] = {}
            for v in sorted(range(48), key=lambda v: (-float(score[b, v]), v)):
                queues.setdefault((v // 6 * rows // 8, v % 6 * cols // 6), []).append(v)
            rounds = [[queue[n] for queue in queues.values() if n < len(queue)] for n in range(48)]
            order = [v for turn in rounds for v in sorted(turn, key=lambda v: (-float(score[b, v]), v))]
            assert kept_of(keep[b]) == set(order[:k])
    plain = make_pruner({"type": "fastv"})(view, torch.full((3,), 16)).keep_BV
    alike = torch.equal(pruner(view, torch.full((3,), 16)).keep_BV, plain)
    assert alike == (rows == 9), "windows of one token are FastV again"


def test_windows_spread_what_attention_heaps_up() -> None:
    """Attention that rises towards the end of the image: FastV keeps the bottom, Window FastV the whole."""
    pruner = make_pruner({"type": "window"})
    view = view_over(pruner, (8, 8), attention_BHV=torch.arange(64.0).expand(3, 4, 64).softmax(-1))
    counts = torch.full((3,), 16)
    assert (view.row_BV[make_pruner({"type": "fastv"})(view, counts).keep_BV] >= 6).all()
    kept = windows(view, 4, 4)[0][pruner(view, counts).keep_BV[0]]
    assert sorted(kept.tolist()) == list(range(16))


# ---------------------------------------------------------------------------------------------------------- quotas


@pytest.mark.parametrize("inner", INNER)
def test_a_quota_of_one_group_is_the_inner_rule(inner: str) -> None:
    for share in ("equal", "proportional"):
        quota, plain = make_pruner({"type": "quota", "pruner": inner, "share": share}), make_pruner({"type": inner})
        view = view_over(quota, (5, 7))
        for k in (1, 6, 20, 35):
            assert torch.equal(quota(view, torch.full((3,), k)).keep_BV, plain(view, torch.full((3,), k)).keep_BV)


@pytest.mark.parametrize(("per", "expected"), [("tile", [4, 4, 4, 4]), ("frame", [4, 4, 4, 4]), ("image", [8, 8])])
def test_quota_per_group(per: str, expected: list[int]) -> None:
    tile = torch.tensor([0] * 4 + [1] * 10 + [2] * 10 + [3] * 24).expand(3, -1)
    image = (tile >= 3).long()
    pruner = make_pruner({"type": "quota", "per": per})
    view = view_over(pruner, (8, 6), tile_BV=tile, image_BV=image)
    group = image if per == "image" else tile
    for keep, groups in zip(pruner(view, torch.full((3,), 16)).keep_BV, group, strict=True):
        assert groups[keep].bincount().tolist() == expected
    shared = make_pruner({"type": "quota", "per": per, "share": "proportional"})
    for keep, groups in zip(shared(view, torch.full((3,), 24)).keep_BV, group, strict=True):
        assert groups[keep].bincount().tolist() == [int(n) // 2 for n in groups.bincount()]


def test_quota_takes_the_best_of_each_group() -> None:
    tile = (torch.arange(48) // 12).expand(3, -1)
    pruner = make_pruner({"type": "quota"})
    view = view_over(pruner, (8, 6), tile_BV=tile)
    score, keep = view.attention_BHV.mean(1), pruner(view, torch.full((3,), 20)).keep_BV
    for b in range(3):
        for t in range(4):
            best = score[b, t * 12 : t * 12 + 12].topk(5).indices + t * 12
            assert kept_of(keep[b] & (tile[b] == t)) == set(best.tolist())


def test_images_of_a_prompt_share_its_budget_equally(model: Any) -> None:
    attach(model, PruningPlan([Stage({"type": "quota", "per": "image"}, 2, keep_tokens=21)], scope="prompt"))
    with record(model) as trace, torch.no_grad():
        model(**batch([(3, 3, 8)]))
    stage = trace.stages[0]
    assert stage.view.image_BV[0][stage.retained_RV[0]].bincount().tolist() == [7, 7, 7]
