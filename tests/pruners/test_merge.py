"""Groups, their means, sizes and medians, and rounds of matching, each against a loop over one row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tpcompress.pruners.merging import bipartite, group_sizes, merge_groups, merge_into_kept, nearest_kept
from tpcompress.pruners.restore import distinctive, median_member
from tpcompress.pruners.tofu import mlerp

D = 8


def features(B: int, V: int, seed: int = 0) -> Tensor:
    return torch.randn(B, V, D, generator=torch.Generator().manual_seed(seed))


def keeps(V: int, *chosen: list[int]) -> Tensor:
    return torch.stack([torch.isin(torch.arange(V), torch.tensor(row)) for row in chosen])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def naive_groups(x: Tensor, kept: list[int]) -> list[int]:
    """Every dropped token joins the first of the most similar retained ones."""
    return [v if v in kept else max(kept, key=lambda k: (cosine(x[v], x[k]), -k)) for v in range(len(x))]


def naive_matching(metric: Tensor, budget: int, average: bool, rounds: int = 24) -> list[int]:
    """The group of each token after rounds of bipartite soft matching, with lists and one pair at a time."""
    members = {v: [v] for v in range(len(metric))}
    for done in itertools.count(1):
        if len(members) <= budget:
            break
        aim = budget + (len(metric) - budget) * max(rounds - done, 0) // rounds
        left = sorted(members)
        point = {v: (metric[members[v]] if average else metric[[v]]).double().mean(0) for v in left}
        a, c = left[::2], left[1::2]
        best = {v: max(c, key=lambda w: (round(cosine(point[v], point[w]), 9), -w)) for v in a}
        order = sorted(a, key=lambda v: (-round(cosine(point[v], point[best[v]]), 9), v))
        for v in order[: min(max(len(left) - aim, 0), len(left) // 2)]:
            members[best[v]] += members.pop(v)
    return [next(g for g, inside in members.items() if v in inside) for v in range(len(metric))]


@pytest.mark.parametrize("V", [1, 2, 7, 13])
@pytest.mark.parametrize("similar", [False, True])
def test_dropped_tokens_join_the_most_similar_retained_one(V: int, similar: bool) -> None:
    x, metric = features(3, V), features(3, V, 5) if similar else None
    chosen = [[0], sorted({0, V // 2, V - 1}), list(range(V))]
    keep, most = keeps(V, *chosen), max(map(len, chosen))
    merged, size = merge_into_kept(x, keep, torch.ones(3, V).bool(), most, metric)
    group, _ = nearest_kept(x if metric is None else metric, keep, torch.ones(3, V).bool(), most)
    for b, kept in enumerate(chosen):
        expected = naive_groups((x if metric is None else metric)[b], kept)
        assert group[b].tolist() == expected
        for v in range(V):
            inside = [w for w in range(V) if expected[w] == v]
            assert size[b, v] == max(len(inside), 1)
            value = x[b, inside].double().mean(0) if v in kept else x[b, v].double()
            assert torch.allclose(merged[b, v].double(), value, atol=1e-6)
    assert torch.equal(merged[2], x[2]), "a full budget merges nothing"


def test_weights_count_in_the_mean_and_not_in_the_size() -> None:
    x, keep = features(1, 6), keeps(6, [1, 4])
    weight = torch.tensor([[0.5, 1.0, 0.0, 0.25, 0.0, 0.0]])
    merged, size = merge_into_kept(x, keep, torch.ones(1, 6).bool(), 2, weight_BV=weight)
    groups = naive_groups(x[0], [1, 4])
    for kept in (1, 4):
        inside = [v for v in range(6) if groups[v] == kept]
        total = sum(float(weight[0, v]) for v in inside)
        value = sum(weight[0, v] * x[0, v] for v in inside) / total if total else x[0, kept]
        assert torch.allclose(merged[0, kept], value, atol=1e-6)
        assert size[0, kept] == len(inside)
    unweighted, _ = merge_into_kept(x, keep, torch.ones(1, 6).bool(), 2, weight_BV=torch.zeros(1, 6))
    assert torch.equal(unweighted, x), "a group without weight keeps its token's value"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_absorbs_nothing_stays_bit_for_bit(dtype: torch.dtype) -> None:
    x = features(2, 9).to(dtype) * 1.2345678901
    x[:, 3] = x[:, 2]  # the only dropped token joins its double
    keep = keeps(9, [0, 1, 2, 4, 5, 6, 7, 8], list(range(9)))
    merged, size = merge_into_kept(x, keep, torch.ones(2, 9).bool(), 9)
    assert merged.dtype == dtype
    rest = [0, 1, 4, 5, 6, 7, 8]
    assert torch.equal(merged[0, rest], x[0, rest])
    assert torch.equal(merged[1], x[1])
    assert size[0].tolist() == [1, 1, 2, 1, 1, 1, 1, 1, 1]


def test_equal_tokens_join_the_earlier_one() -> None:
    x = torch.zeros(1, 6, D)
    x[..., 0] = 1.0
    group, similar = nearest_kept(x, keeps(6, [1, 4]), torch.ones(1, 6).bool(), 2)
    assert group.tolist() == [[1, 1, 1, 1, 4, 1]]
    assert (similar == 1).all()


def test_padding_joins_nothing_and_is_joined_by_nothing() -> None:
    x, keep = features(2, 7), keeps(7, [1, 3], [0, 2])
    valid = torch.arange(10) < torch.tensor([[7], [5]])
    padded = torch.cat([x, torch.full((2, 3, D), 1e3)], 1)
    merged, size = merge_into_kept(padded, torch.cat([keep, torch.zeros(2, 3).bool()], 1), valid, 4)
    for b, count in ((0, 7), (1, 5)):
        alone, alone_size = merge_into_kept(x[b : b + 1, :count], keep[b : b + 1, :count], valid[b : b + 1, :count], 2)
        assert torch.allclose(merged[b, :count], alone[0], atol=1e-6)
        assert torch.equal(size[b, :count], alone_size[0])
    assert torch.equal(merged[0, 7:], padded[0, 7:])
    assert torch.equal(merged[1, 5:], padded[1, 5:])


def test_the_gradient_reaches_every_member_of_a_group() -> None:
    x = features(1, 6).requires_grad_()
    keep = keeps(6, [2, 5])
    merged, size = merge_into_kept(x, keep, torch.ones(1, 6).bool(), 2)
    merged[keep].sum().backward()
    group, _ = nearest_kept(x, keep, torch.ones(1, 6).bool(), 2)
    assert torch.allclose(x.grad[0, :, 0], 1 / size[0, group[0]])


@pytest.mark.parametrize("V", [1, 2, 3, 8, 13, pytest.param(23, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rounds", [1, 2, 5, 24])
@pytest.mark.parametrize("average", [True, False])
def test_rounds_of_matching(V: int, average: bool, rounds: int) -> None:
    x = features(V, V, 9)
    keep, group, joined = bipartite(x, torch.ones(V, V).bool(), torch.arange(1, V + 1), rounds, average)
    for b in range(V):
        assert group[b].tolist() == naive_matching(x[b], b + 1, average, rounds)
        assert keep[b].sum() == b + 1
        assert torch.equal(group_sizes(group)[b] > 0, keep[b])
        assert torch.equal(joined[b] > -torch.inf, ~keep[b])


def test_rounds_of_matching_pass_over_padding_wherever_it_stands() -> None:
    x, valid = features(1, 9), torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1]]).bool()
    keep, group, _ = bipartite(x.masked_fill(~valid[..., None], 1e3), valid, torch.tensor([2]), 24)
    real = valid[0].nonzero().flatten()
    assert real[torch.tensor(naive_matching(x[0, real], 2, True))].tolist() == group[0, real].tolist()
    assert not (keep & ~valid).any()
    assert torch.equal(group[~valid], torch.arange(9)[~valid[0]])


def test_rounds_of_matching_among_equal_tokens_drop_the_earliest_pairs() -> None:
    x = torch.zeros(1, 6, D)
    x[..., 0] = 1.0
    keep, group, _ = bipartite(x, torch.ones(1, 6).bool(), torch.tensor([4]), 1)
    assert group.tolist() == [[1, 1, 1, 3, 4, 5]]
    assert keep.tolist() == [[False, True, False, True, True, True]]


@pytest.mark.parametrize("V", [1, 5, 11])
def test_mlerp_has_the_direction_of_the_mean_and_the_largest_norm(V: int) -> None:
    x, chosen = features(2, V) * torch.arange(1, V + 1)[:, None], [[0], sorted({0, V - 1})]
    keep, valid = keeps(V, *chosen), torch.ones(2, V).bool()
    group, _ = nearest_kept(x, keep, valid, 2)
    value = mlerp(x, group, keep, 2)
    for b, kept in enumerate(chosen):
        for v in kept:
            inside = x[b, group[b] == v].double()
            mean = inside.mean(0)
            assert torch.allclose(value[b, v].double(), mean / mean.norm() * inside.norm(dim=1).max(), atol=1e-5)
    flat = mlerp(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), torch.tensor([[0, 0]]), torch.tensor([[True, False]]), 1)
    assert flat[0, 0].tolist() == [0, 0], "no direction"


def test_mlerp_leaves_tokens_of_no_group_bit_for_bit() -> None:
    x = features(1, 5).bfloat16()
    everything = torch.ones(1, 5).bool()
    assert torch.equal(mlerp(x, torch.arange(5)[None], everything, 5), x)


@pytest.mark.parametrize("V", [1, 2, 9, 14])
def test_median_member(V: int) -> None:
    x, chosen = features(3, V), [[V - 1], sorted({0, V // 2}), list(range(V))]
    keep = keeps(V, *chosen)
    group, _ = nearest_kept(x, keep, torch.ones(3, V).bool(), V)
    place = median_member(group)
    for b, kept in enumerate(chosen):
        for v in range(V):
            inside = [w for w in range(V) if group[b, w] == v]
            assert place[b, v] == (inside[(len(inside) - 1) // 2] if v in kept else v)
        assert len({int(place[b, v]) for v in kept}) == len(kept), "groups share no token, so no position"


def test_distinctive_anchors_are_central_and_not_covered_by_a_stronger_one() -> None:
    x, valid = features(2, 11), torch.arange(11) < torch.tensor([[11], [7]])
    score = distinctive(x, valid)
    for b, count in ((0, 11), (1, 7)):
        near = [[cosine(x[b, i], x[b, j]) for j in range(count)] for i in range(count)]
        central = [sum(row) for row in near]
        for i in range(count):
            stronger = [near[i][j] for j in range(count) if central[j] > central[i]]
            assert float(score[b, i]) == pytest.approx(central[i] * (1 - max([0.0, *stronger])), abs=1e-4)


def test_merge_groups_takes_groups_from_anywhere() -> None:
    x = features(1, 4)
    group, keep = torch.tensor([[3, 1, 3, 3]]), keeps(4, [1, 3])
    merged = merge_groups(x, group, keep, 3)
    assert torch.allclose(merged[0, 3], x[0, [0, 2, 3]].mean(0), atol=1e-6)
    assert torch.equal(merged[0, :3], x[0, :3])
