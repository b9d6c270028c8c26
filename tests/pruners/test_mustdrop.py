"""MustDrop's filter and window merge against loops over tokens and windows."""

from __future__ import annotations

import math

import pytest
import torch
from support import make_pruner, make_view
from torch import Tensor

from tpcompress.pruners import TokenView, create

GRID, D = (5, 7), 16
V = GRID[0] * GRID[1]


def features(B: int = 2, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    smooth = torch.randn(B, 3, 3, D, generator=g)
    up = torch.nn.functional.interpolate(smooth.permute(0, 3, 1, 2), GRID, mode="bilinear").permute(0, 2, 3, 1)
    return (up + 0.2 * torch.randn(B, *GRID, D, generator=g)).reshape(B, V, D)


def judged(view: TokenView, b: int, share: float, peak: float) -> tuple[list[float], list[bool]]:
    """s of each token, and whether it passes both filters of the paper."""
    mean = view.attention_prompt_BHQV[b].double().mean(0)
    mean = mean[view.prompt_role_BQ[b] == 3]
    total, largest = mean.sum(0), mean.amax(0)
    stays = ~((total < share * total.sum()) & (largest < peak))
    score = [max(float(t) / (share * float(total.sum())), float(m) / peak) for t, m in zip(total, largest, strict=True)]
    return score, stays.tolist()


@pytest.mark.parametrize(("keys", "share", "peak"), [(0.08, 0.011, 0.01), (0.3, 0.03, 0.06), (0.0, 0.03, 0.1)])
def test_mustdrop_against_a_loop(keys: float, share: float, peak: float) -> None:
    exact = make_pruner({"type": "mustdrop", "keys": keys, "share": share, "peak": peak})
    counting = make_pruner({"type": "mustdrop", "keys": keys, "share": share, "peak": peak, "threshold": True})
    view = make_view(exact, features(), GRID)
    for b in range(2):
        score, stays = judged(view, b, share, peak)
        key = []
        if keys:
            seen = view.tower_cls_BLHV[b, 0].double().mean(0).tolist()
            key = sorted(range(V), key=lambda v: (-seen[v], v))[: math.ceil(keys * V - 1e-4)]
        others = sorted((v for v in range(V) if v not in key), key=lambda v: (-score[v], v))
        for k in (1, 3, 9, 20, V):
            kept = exact(view, torch.tensor([k, k])).keep_BV[b].nonzero()[:, 0].tolist()
            assert kept == sorted([*key, *others][:k])
        kept = counting(view, torch.tensor([1, 1])).keep_BV[b].nonzero()[:, 0].tolist()
        assert kept == sorted({*key, *(v for v in range(V) if stays[v])})


def test_without_text_after_the_image_all_text_judges_it() -> None:
    pruner = make_pruner({"type": "mustdrop", "keys": 0.0})
    view = make_view(pruner, features(), GRID)
    before = TokenView(**(vars(view) | {"prompt_role_BQ": view.prompt_role_BQ.clamp(max=1)}))
    after = TokenView(**(vars(view) | {"prompt_role_BQ": torch.full_like(view.prompt_role_BQ, 3)}))
    counts = torch.tensor([7, 12])
    assert torch.equal(pruner(before, counts).keep_BV, pruner(after, counts).keep_BV)
    assert not torch.equal(pruner(before, counts).keep_BV, pruner(view, counts).keep_BV)


# -------------------------------------------------------------------------------------------------- window_merge


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def merge(x_VD: Tensor, keep: int | None, side: int, threshold: float = -2.0) -> dict[int, list[int]]:
    """Members of each group by the token that stays; one token after the other joins."""
    groups = {v: [v] for v in range(V)}
    sides = [side]
    while sides[-1] < max(GRID):
        sides.append(2 * sides[-1])
    for s in sides if keep is not None else [side]:
        mean = {v: x_VD[m].double().mean(0) for v, m in groups.items()}
        windows: dict[tuple[int, int], list[int]] = {}
        for v in groups:
            windows.setdefault((v // GRID[1] // s, v % GRID[1] // s), []).append(v)
        found = []
        for tokens in windows.values():
            if len(tokens) < 2:
                continue
            pairs = [cosine(mean[a], mean[b]) for a in tokens for b in tokens if a != b]
            row, col = (sum(f) / len(f) for f in zip(*[divmod(v, GRID[1]) for v in tokens], strict=True))
            middle = min(tokens, key=lambda v: ((v // GRID[1] - row) ** 2 + (v % GRID[1] - col) ** 2, v))
            rest = sorted((v for v in tokens if v != middle), key=lambda v: -cosine(mean[v], mean[middle]))
            found.append((-sum(pairs) / len(pairs), middle, rest))
        for similar, middle, rest in sorted(found):
            for v in rest:
                if (keep is not None and len(groups) > keep) or (keep is None and -similar >= threshold):
                    groups[middle] = groups[middle] + groups.pop(v)
    return groups


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 11, 20, 34, 35])
def test_window_merge_against_a_loop(side: int, k: int) -> None:
    x = features()
    pruner = make_pruner({"type": "window_merge", "metric": "tokens", "side": side, "proportional": True})
    found = pruner(make_view(pruner, x, GRID), torch.tensor([k, k]))
    for b in range(2):
        groups = merge(x[b], k, side)
        assert found.keep_BV[b].nonzero()[:, 0].tolist() == sorted(groups)
        for v, members in groups.items():
            assert torch.allclose(found.vision_BVD[b, v], x[b, members].mean(0), atol=1e-5)
            assert found.size_BV[b, v] == len(members)


@pytest.mark.parametrize("threshold", [-1.0, 0.7, 0.9, 1.0])
def test_a_threshold_merges_whole_windows(threshold: float) -> None:
    x = features()
    pruner = make_pruner({"type": "window_merge", "metric": "tokens", "threshold": threshold})
    found = pruner(make_view(pruner, x, GRID), torch.tensor([1, 1]))
    for b in range(2):
        groups = merge(x[b], None, 3, threshold)
        assert found.keep_BV[b].nonzero()[:, 0].tolist() == sorted(groups)


def test_similarity_is_that_of_the_tower_and_no_window_spans_two_tiles() -> None:
    pruner = create("window_merge")
    assert pruner.tower_layers == (0,)
    x = features()
    view = make_view(pruner, x, GRID)
    tower = view.tower_features_BLVD[:, 0]
    kept = pruner(view, torch.tensor([20, 20])).keep_BV
    assert kept[0].nonzero()[:, 0].tolist() == sorted(merge(tower[0], 20, 3))
    tile = (torch.arange(V) // 14).expand(2, V)
    view = TokenView(**(vars(view) | {"tile_BV": tile}))
    same = make_pruner({"type": "window_merge", "threshold": -1.0})(view, torch.tensor([1, 1]))
    assert same.keep_BV[0].view(GRID).sum(1).tolist() == [3, 0, 3, 0, 3]
