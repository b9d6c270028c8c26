"""TOPS, EADP and SIEVE, which weigh several signals, each against its formula, with loops for one sample."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pruners.test_diversity_rules import best, kept, picks
from support import make_view
from torch import Tensor

from tpcompress.pruners import create
from tpcompress.pruners.base import INSTRUCTION
from tpcompress.pruners.eadp import demanded_cover, instruction_relevance, smooth
from tpcompress.pruners.greedy import cosines
from tpcompress.pruners.sieve import cross_modal_residual, discounted, ridge, word_attention
from tpcompress.pruners.tops import preservation_set, rater_attention

# ------------------------------------------------------------------------------------------------------------ TOPS


def naive_tops(x: Tensor, r: Tensor, count: int, coverage: float, diversity: float, normalise: str) -> list[int]:
    s = F.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1).numpy()
    V = len(s)
    chosen = [best(list(range(V)), lambda i: float(r[i]))]

    def scaled(value: dict[int, float]) -> dict[int, float]:
        numbers = list(value.values())
        if normalise == "mean":
            return {i: v / max(np.mean(numbers), 1e-12) for i, v in value.items()}
        return {i: (v - min(numbers)) / max(max(numbers) - min(numbers), 1e-12) for i, v in value.items()}

    while len(chosen) < count:
        rest = [i for i in range(V) if i not in chosen]
        near = [max(s[j, k] for k in chosen) for j in range(V)]
        c = scaled({i: sum(max(0.0, s[i, j] - near[j]) for j in rest) for i in rest})
        d, a = scaled({i: 1 - near[i] for i in rest}), scaled({i: float(r[i]) for i in rest})
        total = {i: a[i] + coverage * c[i] + diversity * d[i] for i in rest}
        chosen.append(best(rest, total.__getitem__))
    return chosen


@pytest.mark.parametrize("normalise", ["minmax", "mean"])
@pytest.mark.parametrize(("coverage", "diversity"), [(0.5, 0.5), (1.0, 0.0), (0.0, 2.0)])
def test_tops(normalise: str, coverage: float, diversity: float) -> None:
    x, r = torch.randn(3, 19, 8) + 0.3, torch.rand(3, 19) ** 3
    n = [19, 12, 1]
    valid = torch.arange(19) < torch.tensor(n)[:, None]
    x = x.masked_fill(~valid[..., None], 7.0)
    order = preservation_set(cosines(x), r, valid, 15, coverage, diversity, normalise)
    for b in range(3):
        expected = naive_tops(x[b, : n[b]], r[b], min(15, n[b]), coverage, diversity, normalise)
        assert [int((order[b] == k).nonzero()) for k in range(len(expected))] == expected


def test_tops_on_a_device_recounts_what_a_cpu_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    x, r, valid = torch.randn(2, 90, 12) + 0.5, torch.rand(2, 90), torch.arange(90) < torch.tensor([[90], [70]])
    updated = preservation_set(cosines(x), r, valid, 60)
    monkeypatch.setattr("tpcompress.pruners.tops.on_host", lambda x: False)
    assert torch.equal(preservation_set(cosines(x), r, valid, 60), updated)


def test_tops_raters() -> None:
    attention = torch.rand(2, 4, 6, 9)
    role = torch.tensor([[1, 1, INSTRUCTION, INSTRUCTION, INSTRUCTION, 0], [1, 2, 0, 0, 0, 0]])
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    found = rater_attention(attention, role, valid)
    for b, words in enumerate([[2, 3, 4], [0, 1]]):
        n = int(valid[b].sum())
        mean = attention[b].mean(0)[:, :n]
        paid = {q: float(mean[q].sum()) for q in words}
        raters = [q for q in words if paid[q] >= np.mean(list(paid.values()))]
        assert 0 < len(raters) < len(words)
        assert torch.allclose(found[b, :n], torch.stack([mean[q] for q in raters]).mean(0), atol=1e-6)


def test_tops_reads_what_its_relevance_says() -> None:
    needs = {"class": "tower_cls", "received": "tower_received", "raters": "attention_prompt", "last": "attention"}
    for relevance, view_name in needs.items():
        pruner = create({"type": "tops", "relevance": relevance})
        assert pruner.needs == {view_name}
        view = make_view(pruner, torch.randn(1, 12, 16), (3, 4))
        r = {
            "class": lambda v: v.tower_cls_BLHV[:, 0].mean(1),
            "received": lambda v: v.tower_received_BLHV[:, 0].mean(1),
            "last": lambda v: v.attention_BHV.mean(1),
            "raters": lambda v: rater_attention(v.attention_prompt_BHQV, v.prompt_role_BQ, v.valid_BV),
        }[relevance](view)
        expected = naive_tops(view.vision_BVD[0], r[0], 5, 0.5, 0.5, "minmax")
        assert kept(pruner(view, torch.tensor([5])), 0) == set(expected)


# ------------------------------------------------------------------------------------------------------------ EADP


def naive_relevance(x: Tensor, words: Tensor, mu: float, q: float, tau: float, gamma: float) -> Tensor:
    c = F.cosine_similarity(words[:, None].double(), x[None].double(), dim=-1)
    p = (c / tau).softmax(1)
    h = -(p * p.clamp(min=1e-300).log()).sum(1)
    left = h <= torch.quantile(h, q) * (1 + 1e-9)
    a = (-h[left] / gamma).softmax(0)
    return mu * c.mean(0) + (1 - mu) * (a[:, None] * c[left]).sum(0)


@pytest.mark.parametrize(
    ("mu", "q", "tau", "gamma"), [(0.5, 0.5, 0.01, 0.01), (0, 0.3, 0.1, 1.0), (0.8, 1.0, 1.0, 0.1)]
)
def test_eadp_relevance(mu: float, q: float, tau: float, gamma: float) -> None:
    x, text = torch.randn(4, 12, 16), torch.randn(4, 9, 16)
    words = torch.arange(9) < torch.tensor([9, 5, 1, 0])[:, None]
    valid = torch.arange(12) < torch.tensor([12, 12, 7, 12])[:, None]
    found = instruction_relevance(x, valid, text, words, mu, q, tau, gamma)
    for b in range(3):
        n = int(valid[b].sum())
        expected = naive_relevance(x[b, :n], text[b, words[b]], mu, q, tau, gamma)
        assert torch.allclose(found[b, :n].double(), expected, atol=1e-5)
    assert found[3].eq(0).all()


def gaussian(image: Tensor) -> Tensor:
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0]) ** 2) / 2)
    kernel = (line[:, None] * line) / line.sum() ** 2
    return F.conv2d(F.pad(image[None, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[0, 0]


def places(rows: int, cols: int, top: int = 0) -> tuple[Tensor, Tensor]:
    token = torch.arange(rows * cols)
    return token // cols + top, token % cols


def test_eadp_smooths_each_tile_on_its_own() -> None:
    x = torch.rand(1, 20 + 6)
    (row, col), (row_2, col_2) = places(4, 5), places(2, 3, top=4)
    row, col = torch.cat([row, row_2])[None], torch.cat([col, col_2])[None]
    tile = torch.tensor([0] * 20 + [1] * 6)[None, :, None]
    valid = torch.ones(1, 26, dtype=torch.bool)
    found = smooth(x, valid, row, col, tile, (6, 5))
    assert torch.allclose(found[0, :20].view(4, 5), gaussian(x[0, :20].view(4, 5)), atol=1e-6)
    assert torch.allclose(found[0, 20:].view(2, 3), gaussian(x[0, 20:].view(2, 3)), atol=1e-6)


def test_eadp_smooths_around_gaps_and_padding() -> None:
    row, col = torch.tensor([[0, 0, 0, 1, 0, 0]]), torch.tensor([[0, 1, 2, 1, 0, 0]])
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0, 99.0, 99.0]])
    valid = torch.tensor([[True] * 4 + [False] * 2])
    e = math.exp(-0.5)
    down = [1.0, (2 + e * (8 + 8)) / (1 + 2 * e), 4.0, (8 + e * (2 + 2)) / (1 + 2 * e)]
    expected = [(down[0] + 2 * e * down[1]) / (1 + 2 * e), (down[1] + e * (1 + 4)) / (1 + 2 * e)]
    expected += [(down[2] + 2 * e * down[1]) / (1 + 2 * e), down[3]]
    found = smooth(x, valid, row, col, torch.zeros(1, 6, 1), (3, 4))
    assert torch.allclose(found[0, :4], torch.tensor(expected))
    assert torch.equal(smooth(torch.ones(1, 6), valid, row, col, torch.zeros(1, 6, 1), (3, 4))[0, :4], torch.ones(4))


@pytest.mark.parametrize("beta", [1.0, 5.0, 0.0])
def test_eadp(beta: float) -> None:
    pruner = create({"type": "eadp", "beta": beta})
    view = make_view(pruner, torch.randn(3, 20, 16), (4, 5))
    counts = [1, 6, 14]
    selection = pruner(view, torch.tensor(counts))
    for b, count in enumerate(counts):
        x = view.vision_BVD[b]
        aim = naive_relevance(x, view.text_BSD[b][view.text_valid_BS[b]], 0.5, 0.5, 0.01, 0.01)
        w = gaussian(((aim - aim.min() + 1e-6) / (aim.max() - aim.min() + 1e-6)).float().view(4, 5)).flatten() ** beta
        s = 0.5 * (F.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1) + 1).numpy()
        chosen: list[int] = []
        while len(chosen) < count:
            now = [max((s[k, j] for k in chosen), default=0.0) for j in range(20)]
            gain = [sum(float(w[j]) * (max(s[u, j], now[j]) - now[j]) for j in range(20)) for u in range(20)]
            chosen.append(best([u for u in range(20) if u not in chosen], gain.__getitem__))
        assert kept(selection, b) == set(chosen)


def test_eadp_without_words_demands_all_alike() -> None:
    """The paper's stretch would leave every demand at 0, and the first tokens of the sequence."""
    view = make_view(create("eadp"), torch.randn(1, 12, 16), (3, 4))
    view = replace(view, text_valid_BS=torch.zeros_like(view.text_valid_BS))
    similar = cosines(view.vision_BVD).add(1).mul(0.5)
    order = demanded_cover(similar, torch.ones(1, 12), view.valid_BV, 4)
    assert kept(create("eadp")(view, torch.tensor([4])), 0) == set(picks(order[0]))
    assert picks(order[0]) != [0, 1, 2, 3]


# ----------------------------------------------------------------------------------------------------------- SIEVE


def naive_residual(x: Tensor, words: Tensor, energy: float) -> tuple[np.ndarray, np.ndarray]:
    t, v = words.double().numpy(), x.double().numpy()
    mean = t.mean(0)
    t, v = t - mean, v - mean
    gram = t @ t.T
    value = np.sort(np.linalg.eigvalsh(gram))[::-1]
    k = next(k for k in range(1, len(value) + 1) if value[:k].sum() >= energy * value.sum() * (1 - 1e-9))
    left = v - v @ t.T @ np.linalg.inv(gram + (value[k - 1] + 1e-6) * np.eye(len(gram))) @ t
    return left, np.linalg.norm(left, axis=1) / np.linalg.norm(v, axis=1)


@pytest.mark.parametrize("energy", [0.3, 0.75])
def test_sieve_residual(energy: float) -> None:
    x, text = torch.randn(3, 12, 32) + 1, torch.randn(3, 8, 32) + 0.5
    words = torch.arange(8) < torch.tensor([8, 5, 2])[:, None]
    left, share = cross_modal_residual(x, text, words, energy)
    for b in range(3):
        expected, ratio = naive_residual(x[b], text[b, words[b]], energy)
        assert np.allclose(left[b], expected, atol=1e-4)
        assert np.allclose(share[b], ratio, atol=1e-5)


def test_sieve_residual_without_words_is_the_token() -> None:
    x = torch.randn(1, 4, 8)
    left, share = cross_modal_residual(x, torch.randn(1, 3, 8), torch.zeros(1, 3, dtype=torch.bool))
    assert torch.allclose(left, x)
    assert torch.allclose(share, torch.ones(1, 4))
    assert cross_modal_residual(x * 0, x[:, :3] * 0, torch.ones(1, 3, dtype=torch.bool))[1].eq(0).all()


def test_sieve_ridge_is_where_the_energy_is_reached() -> None:
    gram = torch.diag_embed(torch.tensor([[1.0, 8.0, 4.0, 2.0, 1.0], [5.0, 0.0, 0.0, 0.0, 0.0]]))
    for energy, expected in ((0.5, [8.0, 5.0]), (0.75, [4.0, 5.0]), (0.8, [2.0, 5.0]), (1.0, [1.0, 5.0])):
        assert torch.allclose(ridge(gram, energy), torch.tensor(expected), atol=1e-4)


def test_sieve_attention() -> None:
    attention = torch.rand(2, 8, 5, 7) * torch.rand(2, 8, 1, 1)
    words = torch.tensor([[False, True, True, False, True], [False] * 5])
    valid = torch.arange(7) < torch.tensor([[5], [7]])
    found = word_attention(attention, words, valid)
    paid = attention[0][:, words[0], :5].sum(1)
    top = paid.sum(1).topk(3).indices  # 0.375 of 8 heads
    assert torch.allclose(found[0, :5], paid[top].sum(0), atol=1e-6)
    assert found[1].eq(1).all(), "where nobody looks, attention has no part in it"


def naive_discount(score: np.ndarray, s: np.ndarray, count: int) -> list[int]:
    value, chosen = score.astype(float) ** 2, []
    while len(chosen) < count:
        chosen.append(best([i for i in range(len(value)) if i not in chosen], value.__getitem__))
        value = value * (1 - s[chosen[-1]] ** 2)
    return chosen


def test_sieve_discount() -> None:
    x, score = torch.randn(3, 21, 6), torch.rand(3, 21)
    score[1, ::2] = 0
    order = discounted(score, cosines(x), torch.ones(3, 21, dtype=torch.bool), 12)
    for b in range(3):
        s = F.cosine_similarity(x[b][:, None].double(), x[b][None].double(), dim=-1).numpy()
        expected = naive_discount(score[b].double().numpy(), s, 12)
        positive = int((score[b] > 0).sum())
        assert picks(order[b])[:positive] == expected[:positive]


def test_sieve_ranks_on_after_hundreds_of_discounts() -> None:
    """Products of these discounts leave the numbers that fp32 holds after some fifty picks."""
    V = 400
    x = torch.randn(1, V, 3, generator=torch.Generator().manual_seed(2)).double()
    order = discounted(torch.ones(1, V), cosines(x), torch.ones(1, V, dtype=torch.bool), V)[0]
    s = F.cosine_similarity(x[0][:, None], x[0][None], dim=-1)
    total = torch.log(1 - s.square().fill_diagonal_(0)).sum(0)
    late = [i for i in picks(order)[V // 2 :]]
    assert late != sorted(late), "not the order of the sequence"
    assert total[late].mean() < total[picks(order)[: V // 2]].mean()
    twice = x[:, [*range(20), *range(20)]]
    doubled = discounted(torch.ones(1, 40), cosines(twice), torch.ones(1, 40, dtype=torch.bool), 40)[0]
    assert set(picks(doubled)[:20]) == set(range(20)), "a duplicate is worth nothing"
    assert picks(doubled)[20:] == list(range(20, 40))


def test_sieve() -> None:
    pruner = create("sieve")
    view = make_view(pruner, torch.randn(3, 20, 32), (4, 5))
    counts = [1, 6, 14]
    selection = pruner(view, torch.tensor(counts))
    for b, count in enumerate(counts):
        instruction = view.prompt_role_BQ[b] == INSTRUCTION
        words = view.text_BSD[b, view.prompt_column_BQ[b, instruction]]
        left, share = naive_residual(view.vision_BVD[b], words, 0.75)
        paid = view.attention_prompt_BHQV[b][:, instruction].sum(1)
        alike = paid.sum(1).std() < 1e-5  # then the first two of four heads
        a = paid[:2].sum(0) if alike else paid[paid.sum(1).topk(2).indices].sum(0)
        s = left / np.linalg.norm(left, axis=1, keepdims=True)
        assert kept(selection, b) == set(naive_discount(a.numpy() * share, s @ s.T, count))
