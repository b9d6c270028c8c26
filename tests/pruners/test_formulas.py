"""Each published rule against a slow version written from its formula, with loops and no batch."""

from __future__ import annotations

import pytest
import torch
from support import make_pruner, make_view, scramble
from torch import Tensor

from tpcompress.pruners import TokenView, create
from tpcompress.pruners.appliers.noise import noise_gate
from tpcompress.pruners.divprune import farthest_points
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.topk import hash_uniform

V, D = 23, 16


def features(B: int = 3) -> Tensor:
    return torch.randn(B, V, D, generator=torch.Generator().manual_seed(4))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def naive_divprune(x: Tensor, k: int) -> set[int]:
    """max-min: S = {argmax_i min_{j != i} d(i, j)}; then add argmax_{i not in S} min_{j in S} d(i, j)."""
    d = [[1 - cosine(x[i], x[j]) for j in range(len(x))] for i in range(len(x))]
    nearest = [min(d[i][j] for j in range(len(x)) if j != i) for i in range(len(x))]
    chosen = [max(range(len(x)), key=lambda i: (nearest[i], -i))]
    while len(chosen) < k:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(d[i][j] for j in chosen), -i)))
    return set(chosen)


@pytest.mark.parametrize("k", [1, 2, 5, 11, V])
def test_divprune(k: int) -> None:
    x = features()
    keep = make_pruner({"type": "divprune"})(
        make_view(make_pruner({"type": "divprune"}), x), torch.full((3,), k)
    ).keep_BV
    for b in range(3):
        assert set(keep[b].nonzero().flatten().tolist()) == naive_divprune(x[b], k)


def test_divprune_order_is_the_order_of_the_picks() -> None:
    x, valid = features(1), torch.ones(1, V, dtype=torch.bool)
    order = farthest_points(x, valid, 6)[0]
    picks = [int((order == step).nonzero()) for step in range(6)]
    for k in range(1, 7):
        assert set(picks[:k]) == naive_divprune(x[0], k)
    assert (order == V).sum() == V - 6


def naive_dart(view: TokenView, b: int, k: int, nv: int, nt: int, power: int, keys: bool) -> set[int]:
    """Pivots of largest norm; each takes its share of the free tokens of lowest cosine to it."""
    x, text = view.vision_BVD[b], view.text_BSD[b]
    real = view.text_valid_BS[b].nonzero().flatten().tolist()
    norm_of = (view.keys_BVD[b] if keys else x).norm(power, -1)
    text_norm = (view.text_keys_BSD[b] if keys else text).norm(power, -1)
    pivots = sorted(range(len(x)), key=lambda i: (-float(norm_of[i]), i))[:nv][:k]
    kept = list(pivots)
    vectors = [x[i] for i in pivots]
    vectors += [text[i] for i in sorted(real, key=lambda i: (-float(text_norm[i]), i))[:nt]]
    left = k - len(kept)
    for p, vector in enumerate(vectors):
        share = left // len(vectors) + (p < left % len(vectors))
        free = sorted((i for i in range(len(x)) if i not in kept), key=lambda i: (cosine(vector, x[i]), i))
        kept += free[:share]
    return set(kept)


@pytest.mark.parametrize("pivot", ["key_norm", "hidden_norm"])
@pytest.mark.parametrize(("nv", "nt"), [(4, 4), (1, 0), (0, 2), (3, 1), (2, 50)])
def test_dart(pivot: str, nv: int, nt: int) -> None:
    pruner = make_pruner({"type": "dart", "vision_pivots": nv, "text_pivots": nt, "pivot": pivot})
    wide = make_pruner({"type": "dart"})  # needs every view
    view = make_view(wide, features())
    for k in (1, 2, 4, 7, 12, V):
        keep = pruner(view, torch.full((3,), k)).keep_BV
        for b in range(3):
            expected = naive_dart(view, b, k, nv, nt, 1 if pivot == "key_norm" else 2, pivot == "key_norm")
            assert set(keep[b].nonzero().flatten().tolist()) == expected


def test_dart_with_fewer_text_tokens_than_pivots() -> None:
    pruner = make_pruner({"type": "dart", "pivot": "hidden_norm"})
    view = make_view(pruner, features())
    valid = view.text_valid_BS.clone()
    valid[0] = False
    valid[1, :] = torch.arange(valid.shape[1]) == 6
    view = TokenView(**(vars(view) | {"text_valid_BS": valid}))
    keep = pruner(view, torch.tensor([6, 9, 12])).keep_BV
    assert keep.sum(1).tolist() == [6, 9, 12]
    for b, k in enumerate([6, 9, 12]):
        assert set(keep[b].nonzero().flatten().tolist()) == naive_dart(view, b, k, 4, 4, 2, False)


def test_dart_without_any_pivot_keeps_the_first_tokens() -> None:
    pruner = make_pruner({"type": "dart", "pivot": "hidden_norm", "vision_pivots": 0})
    view = make_view(pruner, features())
    view = TokenView(**(vars(view) | {"text_valid_BS": torch.zeros_like(view.text_valid_BS)}))
    assert pruner(view, torch.tensor([3, 3, 3])).keep_BV[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_fastv() -> None:
    pruner = make_pruner({"type": "fastv"})
    view = make_view(pruner, features())
    selection = pruner(view, torch.tensor([1, 5, 9]))
    for b, k in enumerate([1, 5, 9]):
        mean = view.attention_BHV[b].mean(0)
        assert set(selection.keep_BV[b].nonzero().flatten().tolist()) == set(mean.topk(k).indices.tolist())
        assert torch.allclose(selection.scores_BV[b], mean)


def test_pool_averages_each_cell() -> None:
    x = torch.randn(1, 12, D, generator=torch.Generator().manual_seed(1))
    for k in range(1, 13):
        selection = create("pool")(TokenView.of(x, (3, 4)), torch.tensor([k]))
        bands = max(-(-k // 4), min(3, k, round((k * 3 / 4) ** 0.5)), 1)
        means, sizes = [], []
        for band in range(bands):
            rows = [r for r in range(3) if r * bands // 3 == band]
            cells = (band + 1) * k // bands - band * k // bands
            for c in range(cells):
                cols = [q for q in range(4) if q * cells // 4 == c]
                members = [r * 4 + q for r in rows for q in cols]
                means.append(x[0, members].mean(0))
                sizes.append(len(members))
        merged = selection.vision_BVD[0, selection.keep_BV[0]]
        order = torch.cdist(torch.stack(means), merged).argmin(1)
        assert sorted(order.tolist()) == list(range(k))
        assert torch.allclose(merged[order], torch.stack(means), atol=1e-6)
        weighted = (merged[order] * torch.tensor(sizes)[:, None]).sum(0) / 12
        assert torch.allclose(weighted, x[0].mean(0), atol=1e-6), "the mean of the image is preserved"


def test_uniform_takes_the_middle_of_each_cell() -> None:
    keep = create("uniform")(TokenView.of(torch.zeros(1, 36, 2), (6, 6)), torch.tensor([4])).keep_BV
    assert keep.view(6, 6).nonzero().tolist() == [[1, 1], [1, 4], [4, 1], [4, 4]]


def test_random_is_uniform_and_depends_on_its_seed() -> None:
    index = torch.arange(4096)
    draws = torch.stack([hash_uniform(seed, index) for seed in range(8)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert (draws.mean(1) - 0.5).abs().max() < 0.02
    assert (torch.corrcoef(draws) - torch.eye(8)).abs().max() < 0.06
    assert torch.equal(hash_uniform(2**40 + 3, index[:4]), hash_uniform(2**40 + 3, index[:4]))
    assert not torch.equal(hash_uniform(-1, index), hash_uniform(1, index))
    keep = [
        create({"type": "random", "seed": s})(TokenView.of(torch.zeros(1, 64, 2)), torch.tensor([16])).keep_BV
        for s in (0, 1)
    ]
    assert not torch.equal(*keep)


def test_random_resample_draws_anew_in_training_only() -> None:
    pruner, view, count = (
        create({"type": "random", "resample": True}),
        TokenView.of(torch.zeros(2, 64, 2)),
        torch.tensor([16, 16]),
    )
    first, second = pruner.train()(view, count).keep_BV, pruner(view, count).keep_BV
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]), "each image its own subset"
    pruner.eval()
    assert torch.equal(pruner(view, count).keep_BV, create("random").eval()(view, count).keep_BV)


def test_noise_gate_ends_are_identity_and_noise() -> None:
    x = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    valid = torch.ones(2, 200, dtype=torch.bool)
    open_ = noise_gate(x, torch.ones(2, 200), valid)
    assert (open_ - x).abs().max() < 0.05
    closed = noise_gate(x, torch.zeros(2, 200), valid)
    assert abs(torch.corrcoef(torch.stack([closed.flatten(), x.flatten()]))[0, 1].item()) < 0.15
    for out in (open_, closed, noise_gate(x, torch.full((2, 200), 0.5), valid)):
        assert torch.allclose(out.mean((0, 1)), x.mean((0, 1)), atol=0.6)
        assert torch.allclose(out.std((0, 1)), x.std((0, 1)), rtol=0.15), "the variance is preserved"


def test_learned_gate_reserve_is_always_kept() -> None:
    pruner = make_pruner({"type": "learned_gate", "reserve": 4})
    grid = create("uniform")(TokenView.of(torch.zeros(1, 64, D), (8, 8)), torch.tensor([4])).keep_BV[0]
    x = torch.randn(5, 64, D, generator=torch.Generator().manual_seed(2))
    keep = pruner(TokenView.of(x, (8, 8)), torch.full((5,), 10)).keep_BV
    assert keep[:, grid].all()
    assert len({tuple(k.tolist()) for k in keep}) > 1, "the rest follows the image"


def test_learned_gate_reserve_stands_above_any_outlier() -> None:
    """Of 625 tokens one may score 25 deviations above the mean."""
    pruner = make_pruner({"type": "learned_gate", "reserve": 4})
    pruner.scorer.forward = lambda tokens: Scores(torch.eye(625)[:1] * 9)  # type: ignore[union-attr, method-assign]
    grid = create("uniform")(TokenView.of(torch.zeros(1, 625, D), (25, 25)), torch.tensor([4])).keep_BV
    selection = pruner(TokenView.of(torch.zeros(1, 625, D), (25, 25)), torch.tensor([4]))
    assert torch.equal(selection.keep_BV, grid)


def test_learned_gate_question_condition_reads_the_question() -> None:
    pruner = make_pruner({"type": "learned_gate", "scorer": {"type": "local_global", "question": True}})
    x = torch.randn(1, 64, D).expand(2, -1, -1)
    text = torch.randn(2, 5, D)
    view = TokenView.of(x, (8, 8), text_BSD=text, text_valid_BS=torch.ones(2, 5).bool())
    scores = pruner(view, torch.tensor([8, 8])).scores_BV
    assert not torch.allclose(scores[0], scores[1])
    hidden = TokenView.of(x, (8, 8), text_BSD=text, text_valid_BS=torch.zeros(2, 5).bool())
    assert pruner(hidden, torch.tensor([8, 8])).scores_BV.isfinite().all()


def test_learned_gate_temperature_falls_with_progress() -> None:
    pruner = make_pruner({"type": "learned_gate"}).train()
    view = TokenView.of(torch.randn(1, 64, D), (8, 8), soft=True)
    entropy = []
    for progress in (0.0, 0.5, 1.0, 7.0):
        pruner.set_progress(progress)
        gate = pruner(view, torch.tensor([16])).gate_BV
        entropy.append((gate * (1 - gate)).sum().item())
    assert entropy[0] > entropy[1] > entropy[2]
    assert entropy[2] == pytest.approx(entropy[3])


def test_learned_gate_gradient_reaches_every_weight() -> None:
    pruner = create({"type": "learned_gate", "scorer": {"type": "local_global", "question": True}}).train()
    pruner.build(D)
    scramble(pruner)
    view = make_view(pruner, torch.randn(2, 12, D), (3, 4), soft=True)
    selection = pruner(view, torch.tensor([3, 6]))
    (selection.vision_BVD * torch.randn(2, 12, D)).sum().backward()
    # A constant added to every score changes nothing.
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in pruner.named_parameters() if n != "scorer.score.bias"
    )
