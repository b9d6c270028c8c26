"""FlashVID's steps against loops over tokens, and what holds for every budget."""

from __future__ import annotations

import math

import pytest
import torch
from pruners.test_dtd import clip, video_view
from support import make_view
from torch import Tensor

from tpcompress.pruners import TokenView, create
from tpcompress.pruners.flashvid import density_peaks, segments, trees
from tpcompress.pruners.greedy import cosines

SHAPE = (4, 3, 5)
T, N, V = 4, 15, 60
FRAME = torch.arange(T).repeat_interleave(N).expand(2, V)
TRUE = torch.ones(2, V, dtype=torch.bool)


def view_of(x: Tensor, attention: bool = True, **more: object) -> TokenView:
    view = video_view(x, SHAPE, **more)
    if attention:
        drawn = make_view(create("flashvid"), x).tower_received_BLHV
        view = video_view(x, SHAPE, tower_received_BLHV=drawn, **more)
    return view


def cos(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def distinct(x_VD: Tensor, weight: list[float], count: int) -> list[int]:
    """Weighted farthest points of each frame, the earlier frames take what does not divide."""
    found: list[int] = []
    for t in range(T):
        tokens, picked = list(range(t * N, (t + 1) * N)), []
        for _ in range(count // T + (t < count % T)):

            def far(j: int, picked: list[int] = picked, tokens: list[int] = tokens) -> float:
                others = picked or [i for i in tokens if i != j]
                return weight[j] * min(1 - cos(x_VD[i], x_VD[j]) for i in others)

            picked.append(max((j for j in tokens if j not in picked), key=lambda j: (far(j), -j)))
        found += picked
    return found


def linked(x_VD: Tensor, left: list[int], segment: list[int], threshold: float, most: int) -> list[int]:
    """Root of every token."""
    best = {}
    for v in left:
        before = [u for u in left if u // N == v // N - 1 and segment[u] == segment[v]]
        if before:
            u = max(before, key=lambda u: (cos(x_VD[u], x_VD[v]), -u))
            if cos(x_VD[u], x_VD[v]) > threshold:
                best[v] = (cos(x_VD[u], x_VD[v]), u)
    links = {v: best[v][1] for v in sorted(best, key=lambda v: (-best[v][0], v))[:most]}
    root = []
    for v in range(len(x_VD)):
        while v in links:
            v = links[v]
        root.append(v)
    return root


def peaks(mean: dict[int, Tensor], count: int) -> dict[int, int]:
    """The centre of every root."""
    frames = {t: [v for v in mean if v // N == t] for t in range(T)}
    turns = sorted((j + 0.5) / len(tokens) + 1e-9 * tokens[j] for tokens in frames.values() for j in range(len(tokens)))
    clusters = {
        t: sum((j + 0.5) / len(f) + 1e-9 * f[j] in turns[:count] for j in range(len(f))) for t, f in frames.items()
    }
    centres: list[int] = []
    for t, tokens in frames.items():
        far = {(a, b): float((mean[a] - mean[b]).norm()) / 4 for a in tokens for b in tokens}
        near = min(max(clusters[t], 1), 7, len(tokens))
        density = {a: math.exp(-sum(sorted(far[a, b] ** 2 for b in tokens)[:near]) / near) for a in tokens}
        delta = {}
        for a in tokens:
            denser = [b for b in tokens if (density[b], -b) > (density[a], -a)]
            delta[a] = min(far[a, b] for b in denser) if denser else max(far[a, b] for b in tokens)
        centres += sorted(tokens, key=lambda a: (-density[a] * delta[a], a))[: clusters[t]]
    joins = {}
    for a in mean:
        own = [c for c in centres if c // N == a // N] or centres
        joins[a] = a if a in centres else min(own, key=lambda c: (float((mean[a] - mean[c]).norm()), c))
    return joins


@pytest.mark.parametrize("k", [1, 4, 7, 13, 20, 37, 60])
def test_the_whole_rule_against_a_loop(k: int) -> None:
    x = clip(2, SHAPE, seed=3)
    view = view_of(x)
    found = create({"type": "flashvid", "min_segments": 2, "size": True, "threshold": 0.2, "segment": 0.3})(
        view, torch.tensor([k, k])
    )
    assert found.keep_BV.sum(1).tolist() == [k, k]
    for b in range(2):
        weight = view.tower_received_BLHV[b, 0].double().mean(0).tolist()
        means = [x[b, t * N : (t + 1) * N].mean(0) for t in range(T)]
        near = [cos(means[t], means[t + 1]) for t in range(T - 1)]
        cuts = {t for t in range(T - 1) if near[t] < 0.3} | {near.index(min(near))}
        segment = [sum(c < v // N for c in cuts) for v in range(V)]
        own_count = math.ceil(0.7 * k - 1e-9)
        own = distinct(x[b], weight, own_count)
        left = [v for v in range(V) if v not in own]
        root = linked(x[b], left, segment, 0.2, V - k)
        assert k > 30 or any(root[v] != v for v in left), "some link"
        members: dict[int, list[int]] = {}
        for v in left:
            members.setdefault(root[v], []).append(v)
        joins = peaks({r: x[b, m].mean(0) for r, m in members.items()}, k - own_count) if k > own_count else {}
        centres = {c for c in joins.values()}
        assert found.keep_BV[b].nonzero()[:, 0].tolist() == sorted([*own, *centres])
        for c in centres:
            group = [v for r, m in members.items() if joins[r] == c for v in m]
            assert torch.allclose(found.vision_BVD[b, c], x[b, group].mean(0), atol=1e-5)
            assert found.size_BV[b, c] == len(group)
        assert all(torch.equal(found.vision_BVD[b, v], x[b, v]) for v in own)


def test_segments_end_where_frames_change_and_there_are_enough() -> None:
    x = torch.eye(16)[[0, 0, 1, 1]].repeat_interleave(N, 0).expand(2, V, 16)
    ends = {least: segments(x, FRAME, TRUE, 0.9, least)[0, ::N].tolist() for least in (1, 2, 3, 4, 9)}
    assert ends == {1: [0, 0, 1, 1], 2: [0, 0, 1, 1], 3: [0, 1, 2, 2], 4: [0, 1, 2, 3], 9: [0, 1, 2, 3]}


def test_trees_of_equal_frames_are_the_first_frame() -> None:
    x = clip(1, (1, 3, 5)).repeat(2, T, 1)
    root = trees(cosines(x), FRAME, torch.zeros_like(FRAME), TRUE, 0.8, torch.tensor([[V], [V]]))
    assert root[0].tolist() == list(range(N)) * T
    apart = trees(cosines(x), FRAME, FRAME // 2, TRUE, 0.8, torch.tensor([[V], [3]]))
    assert apart[0].unique().tolist() == [*range(N), *range(2 * N, 3 * N)]
    assert len(apart[1].unique()) == V - 3


def test_a_chain_of_three_is_the_mean_of_three() -> None:
    x = torch.zeros(1, 3, 16)
    x[0, :, 0] = torch.tensor([1.0, 2.0, 6.0])
    view = TokenView.of(x, (3, 1), tile_BV=torch.tensor([[0, 1, 2]]))
    rule = {"type": "flashvid", "alpha": 0.0, "attention": "none", "min_segments": 1, "size": True}
    found = create(rule)(view, torch.tensor([1]))
    assert found.keep_BV.tolist() == [[True, False, False]]
    assert found.vision_BVD[0, 0, 0] == 3.0
    assert found.size_BV[0, 0] == 3


def test_nothing_links_over_tiles_of_an_image() -> None:
    x = clip(1, (1, 3, 5)).repeat(2, T, 1)
    of_video = torch.tensor([[True], [False]]).expand(2, V)
    rule = {"type": "flashvid", "alpha": 0.0, "attention": "none", "min_segments": 1}
    found = create(rule)(view_of(x, False, video_BV=of_video), torch.tensor([N, N]))
    assert found.keep_BV[0].nonzero()[:, 0].tolist() == list(range(N))
    assert found.keep_BV[1].view(T, N).sum(1).tolist() == [4, 4, 4, 3]


def test_alpha_one_merges_nothing() -> None:
    x = clip(2, SHAPE)
    found = create({"type": "flashvid", "alpha": 1.0})(view_of(x), torch.tensor([9, 30]))
    assert torch.equal(found.vision_BVD, x)
    weight = view_of(x).tower_received_BLHV[0, 0].double().mean(0).tolist()
    assert found.keep_BV[0].nonzero()[:, 0].tolist() == sorted(distinct(x[0], weight, 9))


def test_density_peaks_of_two_clumps() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 10, 16, generator=g) * 0.1
    x[:, 5:] += 9
    frame = torch.zeros(1, 10, dtype=torch.long)
    centre, joins = density_peaks(x, frame, torch.ones(1, 10, dtype=torch.bool), torch.tensor([[2]]))
    assert [int(centre[0, :5].sum()), int(centre[0, 5:].sum())] == [1, 1]
    assert len(joins[0, :5].unique()) == len(joins[0, 5:].unique()) == 1
