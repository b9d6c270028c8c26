"""The loop of greedy picks, and facility location both ways: all gains at every pick, and lazily."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tpcompress.pruners.greedy import Coverage, Criterion, cosines, first_picks, greedy, stretch


class Fixed(Criterion):
    """Scores that no pick changes."""

    def __init__(self, score_BV: Tensor) -> None:
        self.score_BV, self.taken = score_BV, []

    def score(self, open_BV: Tensor) -> Tensor:
        return self.score_BV

    def take(self, pick_B1: Tensor) -> None:
        self.taken.append(pick_B1.flatten().tolist())


def test_order_ties_padding_and_rows_that_run_out() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [9.0, 1.0, 1.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True, True], [False, True, True, False], [False, False, False, True]])
    criterion = Fixed(score)
    order = greedy(criterion, valid, 3)
    assert order.tolist() == [[4, 0, 1, 2], [4, 0, 1, 4], [4, 4, 4, 0]]
    assert [row[0] for row in criterion.taken] == [1, 2, 3]
    selection = first_picks(order, valid, torch.tensor([2, 3, 4]))
    assert selection.keep_BV.tolist() == [
        [False, True, True, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    assert selection.scores_BV[0].tolist() == [-4, 0, -1, -2]


def test_repeated_picks_are_lost() -> None:
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert greedy(Fixed(torch.tensor([[1.0, 2.0, 0.0]])), valid, 3, repeat=True).tolist() == [[3, 0, 3]]


def test_cosines_of_duplicates_are_one() -> None:
    x = torch.randn(2, 9, 4096)
    similar = cosines(torch.cat([x, x * 7], 1).bfloat16().float())
    assert (similar <= 1).all()
    assert (similar.diagonal(dim1=1, dim2=2) == 1).all()
    assert cosines(torch.zeros(1, 3, 4)).eq(0).all()


def test_stretch() -> None:
    x, valid = torch.tensor([[3.0, 1.0, 2.0, 99.0], [5.0, 5.0, 5.0, 0.0]]), torch.tensor([[True] * 3 + [False]] * 2)
    out = stretch(x, valid)
    assert torch.allclose(out, torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 0.0]]), atol=1e-5)
    assert (out[valid] > 0).all()


# ------------------------------------------------------------------------------------------------ facility location


def inputs(kind: str, B: int, V: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, V, 24, generator=g)
    if kind == "offset":  # all alike, as features of real images are
        return x * 0.3 + 1
    if kind == "clustered":
        return x[:, torch.randint(0, max(1, V // 8), (V,), generator=g)] + 0.3 * torch.randn(B, V, 24, generator=g)
    if kind == "duplicated":
        return x[:, torch.arange(V) % max(1, V // 5)]
    if kind == "constant":
        return torch.ones_like(x)
    if kind == "zero":
        return torch.zeros_like(x)
    return x


def weights(kind: str, B: int, V: int, seed: int) -> Tensor | None:
    w = torch.rand(B, V, generator=torch.Generator().manual_seed(seed + 50))
    return {"none": None, "even": w, "peaky": w**20, "rare": (w > 0.8).float(), "zero": torch.zeros(B, V)}[kind]


@pytest.mark.parametrize("kind", ["random", "offset", "clustered", "duplicated", "constant", "zero"])
@pytest.mark.parametrize("weigh", ["none", "even", "peaky", "rare", "zero"])
def test_lazy_picks_are_those_of_the_full_look(kind: str, weigh: str) -> None:
    for seed, (B, V) in enumerate([(1, 1), (2, 2), (1, 17), (3, 41), (2, 151)]):
        similar = cosines(inputs(kind, B, V, seed))
        valid = torch.arange(V) < torch.tensor([V, max(1, V // 2), max(1, V - 3)])[:B, None]
        for demand_kind, start in (("none", 0.0), (weigh, -1.0)):
            demand = weights(demand_kind, B, V, seed + 7)
            demand = valid.float() if demand is None else demand * valid
            weight, picks = weights(weigh, B, V, seed), min(V, 50)
            lazy, full = (
                greedy(Coverage(similar, demand, weight, start, lazy=lazy), valid, picks) for lazy in (True, False)
            )
            assert torch.equal(lazy, full)
            assert sorted(lazy[0].tolist())[:picks] == list(range(picks))


def test_lazy_sums_are_the_bits_of_the_full_sums() -> None:
    """What laziness rests on: a gain does not depend on which other candidates are looked at with it."""
    for V in (1, 2, 15, 33, 576):
        similar = cosines(inputs("offset", 2, V, V))
        cover = Coverage(similar, torch.rand(2, V), torch.rand(2, V))
        cover.take(torch.tensor([[0], [V // 2]]))
        full = cover.gains(similar, cover.weight_BV)
        for M in (1, 2, 16, V):
            some = torch.randint(0, V, (M,))
            assert torch.equal(cover.gains(similar[:, some], cover.weight_BV[:, some]), full[:, some])


def test_lazy_looks_at_few_and_gains_never_rise() -> None:
    looked = []

    class Watched(Coverage):
        def gains(self, similar_BMV: Tensor, weight_BM: Tensor | None) -> Tensor:
            gain = super().gains(similar_BMV, weight_BM)
            looked.append(gain.shape[1])
            return gain

    V, picks = 512, 64
    similar, valid = cosines(inputs("clustered", 1, V, 0)), torch.ones(1, V, dtype=torch.bool)
    greedy(Watched(similar, valid.float(), lazy=True), valid, picks)
    assert sum(looked) < 0.2 * V * picks
    cover = Coverage(similar, valid.float(), torch.rand(1, V))
    before = cover.score(valid)
    for pick in range(20):
        cover.take(torch.tensor([[pick * 7]]))
        now = cover.score(valid)
        assert (now <= before).all()
        before = now


def test_coverage_is_the_formula() -> None:
    B, V = 3, 19
    similar, valid = cosines(torch.randn(B, V, 8)), torch.arange(V) < torch.tensor([19, 11, 1])[:, None]
    demand, weight = torch.rand(B, V) * valid, torch.rand(B, V)
    order = greedy(Coverage(similar, demand, weight), valid, 9)
    for b in range(B):
        s, m, w = (t[b].double().numpy() for t in (similar, demand, weight))
        n = int(valid[b].sum())
        picks: list[int] = []
        for _ in range(min(9, n)):
            covered = np.max(s[picks], axis=0, initial=0.0) if picks else np.zeros(V)
            gain = [w[u] * sum(m[j] * max(0.0, s[u, j] - covered[j]) for j in range(V)) for u in range(n)]
            picks.append(max((u for u in range(n) if u not in picks), key=lambda u: (gain[u], -u)))
        assert [int((order[b] == k).nonzero()) for k in range(len(picks))] == picks


def test_many_tokens_in_the_hosts_memory_are_covered_lazily() -> None:
    similar = torch.eye(800)[None]
    assert Coverage(similar, torch.ones(1, 800)).bound_BV is not None
    assert Coverage(similar[:, :9, :9], torch.ones(1, 9)).bound_BV is None, "keeping bounds costs more than it saves"
    assert Coverage(similar.to("meta"), torch.ones(1, 800, device="meta")).bound_BV is None


def test_the_full_look_compiles_into_one_graph() -> None:
    """A fixed number of steps without a look at any number: what a CUDA graph can record."""

    def picks(similar: Tensor, valid: Tensor) -> Tensor:
        return greedy(Coverage(similar, valid.float()), valid, 5)

    similar, valid = cosines(torch.randn(1, 800, 8)), torch.ones(1, 800, dtype=torch.bool)
    compiled = torch.compile(picks, fullgraph=True, backend="eager")
    assert torch.equal(compiled(similar, valid), picks(similar, valid))
