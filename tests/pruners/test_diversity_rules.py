"""Pruners that pick one token after another, each against its formula, written with loops for one sample."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pruners import test_contract
from support import make_pruner, make_view, pad_view, view_rows
from torch import Tensor

from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.base import INSTRUCTION
from tpcompress.pruners.cdpruner import likeliest, mean_cosine
from tpcompress.pruners.divprune import farthest_points
from tpcompress.pruners.eadp import demanded_cover, instruction_relevance, smooth
from tpcompress.pruners.greedy import cosines, stretch
from tpcompress.pruners.scope import salient_cover
from tpcompress.pruners.sieve import cross_modal_residual, discounted, ridge, word_attention
from tpcompress.pruners.tops import preservation_set, rater_attention

RULES = ("divprune", "cdpruner", "scope", "tops", "eadp", "sieve")
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cdpruner": [{"relevance": "class"}, {"relevance": "received"}, {"relevance": "none"}],
    "scope": [{"feature": "tokens", "attention": "received"}, {"attention": "none"}, {"alpha": 0.5}],
    "tops": [
        {"relevance": "raters", "coverage": 1.0},
        {"relevance": "last", "normalise": "mean"},
        {"relevance": "received", "diversity": 0.0},
    ],
    "eadp": [{"mu": 0.0, "q": 0.3, "beta": 5.0}, {"mu": 1.0, "q": 1.0, "beta": 0.0}],
    "sieve": [{"energy": 1.0, "heads": 1.0}],
}
CONFIGS = [{"type": name, **more} for name, variants in VARIANTS.items() for more in variants]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_variants_keep_the_contract(config: dict[str, Any]) -> None:
    for V in (1, 2, 7, 12):
        test_contract.test_every_budget_is_exact(config, V)
    for kind in ("constant", "zero", "duplicated", "peaky", "tiny"):
        test_contract.test_awkward_inputs_stay_finite_and_exact(config, kind)
    for promise in (
        "rows_are_independent_of_the_batch",
        "padding_changes_nothing_and_is_never_kept",
        "same_call_same_answer",
        "ties_go_to_the_earlier_token",
        "config_round_trip",
        "bf16_equals_fp32",
        "does_not_change_its_inputs",
    ):
        getattr(test_contract, f"test_{promise}")(config)


@pytest.mark.parametrize("name", RULES)
def test_recipe(name: str) -> None:
    plan = PruningPlan.from_file(Path(__file__).parents[2] / "recipes" / "free" / f"{name}.yaml")
    assert {stage.rule.name for stage in plan.stages} == {name}


def picks(order_V: Tensor) -> list[int]:
    """Tokens in the order of their picks."""
    return [int(i) for i in order_V.argsort(stable=True) if order_V[i] < len(order_V)]


def best(candidates: list[int], value: Any) -> int:
    """The earliest of the best; what differs by rounding alone is equal."""
    top = max(value(i) for i in candidates)
    return next(i for i in candidates if value(i) >= top - 1e-9 * max(1.0, abs(top)))


def kept(selection: Any, b: int) -> set[int]:
    return set(selection.keep_BV[b].nonzero().flatten().tolist())


# -------------------------------------------------------------------------------------------------------- DivPrune


def official_divprune(x: Tensor, count: int) -> set[int]:
    """The loop of the official code on one image: nothing hides what was picked."""
    unit = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    chosen = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(chosen) < count:
        chosen.append(int(distance[chosen].amin(0).argmax()))
    return set(chosen)


def test_divprune_compat_loses_picks_on_duplicates() -> None:
    """8 different tokens among 128, 64 asked for: 8 stay there, 64 here."""
    x = torch.eye(16)[:8].repeat(16, 1)[None]
    count = torch.tensor([64])
    compat, ours = create({"type": "divprune", "compat": True}), create("divprune")
    view = TokenView.of(x)
    assert kept(compat(view, count), 0) == official_divprune(x[0], 64) == set(range(8))
    assert compat.exact is False
    assert ours.exact is True
    assert int(ours(view, count).keep_BV.sum()) == 64


@pytest.mark.parametrize("count", [1, 2, 9, 23])
def test_divprune_compat_is_the_official_loop(count: int) -> None:
    x = torch.randn(3, 23, 16, generator=torch.Generator().manual_seed(4))
    selection = create({"type": "divprune", "compat": True})(TokenView.of(x), torch.full((3,), count))
    for b in range(3):
        assert kept(selection, b) == official_divprune(x[b], count)


def test_divprune_compat_counts_row_by_row() -> None:
    x = torch.eye(4).repeat(3, 1).expand(3, 12, 4)
    valid = torch.arange(12) < torch.tensor([12, 6, 3])[:, None]
    view = replace(TokenView.of(x), valid_BV=valid)
    keep = create({"type": "divprune", "compat": True})(view, torch.tensor([3, 6, 3])).keep_BV
    assert keep.sum(1).tolist() == [3, 4, 3]
    assert not (keep & ~valid).any()
    order = farthest_points(x, valid, 6, repeat=True)
    assert order[1].tolist() == [1, 2, 0, 3] + [12] * 8


# -------------------------------------------------------------------------------------------------------- CDPruner


def largest_determinants(kernel: np.ndarray, count: int) -> list[int]:
    """Greedy by the determinant itself."""
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [i for i in range(len(kernel)) if i not in chosen]
        sub = [chosen + [i] for i in rest]
        volume = {s[-1]: np.linalg.slogdet(kernel[np.ix_(s, s)])[1] for s in sub}
        chosen.append(best(rest, volume.__getitem__))
    return chosen


@pytest.mark.parametrize("relevant", [True, False])
def test_cdpruner_maximises_the_determinant(relevant: bool) -> None:
    B, V = 4, 14
    x = torch.randn(B, V, 24) + 0.7
    r = torch.rand(B, V) * 0.999 + 1e-3 if relevant else torch.ones(B, V)
    order = likeliest(cosines(x), r, torch.ones(B, V, dtype=torch.bool), 11)
    for b in range(B):
        unit = F.normalize(x[b].double(), dim=-1)
        kernel = (r[b, :, None].double() * (unit @ unit.T) * r[b].double()).numpy()
        assert picks(order[b]) == largest_determinants(kernel, 11)


def test_cdpruner_reads_the_mean_cosine_of_the_words() -> None:
    pruner = create("cdpruner")
    view = make_view(pruner, torch.randn(3, 12, 16), (3, 4))
    selection = pruner(view, torch.tensor([2, 5, 9]))
    for b, count in enumerate([2, 5, 9]):
        words = view.text_BSD[b][view.text_valid_BS[b]].double()
        x = view.vision_BVD[b].double()
        cosine = [np.mean([float(F.cosine_similarity(x[i], w, dim=0)) for w in words]) for i in range(12)]
        low, high = min(cosine), max(cosine)
        r = np.array([(c - low + 1e-6) / (high - low + 1e-6) for c in cosine])
        unit = F.normalize(x, dim=-1)
        kernel = r[:, None] * (unit @ unit.T).numpy() * r
        assert kept(selection, b) == set(largest_determinants(kernel, count))


def test_cdpruner_depends_on_no_neighbour() -> None:
    """There, min and max were taken over the batch, and 7 to 15 of 32 picks changed with the image beside."""
    pruner = create("cdpruner")
    x = torch.cat([torch.randn(1, 64, 32), torch.randn(1, 64, 32) * 0.1 + 3])
    view = make_view(pruner, x, (8, 8))
    together = pruner(view, torch.tensor([32, 32])).keep_BV
    for b in range(2):
        assert torch.equal(pruner(view_rows(view, [b]), torch.tensor([32])).keep_BV[0], together[b])


def test_cdpruner_with_equal_relevance_is_a_plain_process() -> None:
    """There, 0 / 0 left 2 of 32 tokens."""
    x = torch.randn(2, 64, 80)
    view = make_view(create("cdpruner"), x, (8, 8))
    view = replace(view, text_valid_BS=torch.zeros_like(view.text_valid_BS))
    count = torch.tensor([32, 32])
    plain = create({"type": "cdpruner", "relevance": "none"})(TokenView.of(x), count)
    assert torch.equal(create("cdpruner")(view, count).keep_BV, plain.keep_BV)
    assert plain.keep_BV.sum(1).tolist() == [32, 32]
    assert mean_cosine(x, view.text_BSD.new_zeros(2, 3, 80), torch.zeros(2, 3, dtype=torch.bool)).eq(0).all()


@pytest.mark.parametrize("D", [5, 16])
def test_cdpruner_keeps_the_count_of_a_singular_kernel(D: int) -> None:
    """There, 28 of 64 stayed: once all is explained, relevance leads, then position."""
    V = 64
    x = torch.randn(1, 20, D)[:, torch.arange(V) % 20]
    r = (torch.randint(1, 4, (1, V)) / 3).float()
    order = likeliest(cosines(x), r, torch.ones(1, V, dtype=torch.bool), V)[0]
    rank = min(D, 20)
    chosen = picks(order)
    assert sorted(chosen) == list(range(V))
    assert torch.linalg.matrix_rank(x[0, chosen[:rank]].double()) == rank
    rest = [i for i in range(V) if i not in chosen[:rank]]
    assert chosen[rank:] == sorted(rest, key=lambda i: (-float(r[0, i]), i))


def test_cdpruner_survives_relevance_near_zero() -> None:
    x, r = torch.randn(1, 30, 40), torch.full((1, 30), 1e-6)
    r[0, :3] = 1.0
    order = likeliest(cosines(x), r, torch.ones(1, 30, dtype=torch.bool), 30)[0]
    assert set(picks(order)[:3]) == {0, 1, 2}
    unit = F.normalize(x[0].double(), dim=-1)
    kernel = (r[0, :, None].double() * (unit @ unit.T) * r[0].double()).numpy()
    assert picks(order)[:12] == largest_determinants(kernel, 12)


def test_the_joint_space_is_refused_with_its_reason() -> None:
    for name in ("cdpruner", "eadp"):
        pruner = create({"type": name, "relevance": "joint"})
        assert pruner.needs == {"joint"}
        with pytest.raises(ValueError, match="joint space of image and text; set relevance to text"):
            pruner(TokenView.of(torch.randn(1, 4, 8)), torch.tensor([2]))


# ----------------------------------------------------------------------------------------------------------- SCOPE


def naive_scope(x: Tensor, a: Tensor, alpha: float, count: int) -> list[int]:
    s = F.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1).numpy()
    V, chosen = len(s), []
    while len(chosen) < count:
        covered = [max([0.0, *(s[k, j] for k in chosen)]) for j in range(V)]
        gain = [sum(max(0.0, s[i, j] - covered[j]) for j in range(V)) * float(a[i]) ** alpha for i in range(V)]
        chosen.append(best([i for i in range(V) if i not in chosen], gain.__getitem__))
    return chosen


@pytest.mark.parametrize(
    ("feature", "attention", "alpha"),
    [("tower", "class", 1.0), ("tokens", "received", 2.0), ("tower", "none", 1.0), ("tokens", "class", 0.0)],
)
def test_scope(feature: str, attention: str, alpha: float) -> None:
    pruner = create({"type": "scope", "feature": feature, "attention": attention, "alpha": alpha})
    view = make_view(pruner, torch.randn(3, 21, 16), (3, 7))
    counts = [1, 6, 15]
    selection = pruner(view, torch.tensor(counts))
    source = {"class": view.tower_cls_BLHV, "received": view.tower_received_BLHV}.get(attention)
    for b, count in enumerate(counts):
        x = view.tower_features_BLVD[b, 0] if feature == "tower" else view.vision_BVD[b]
        # The sum over heads, as there: the same picks as by our mean.
        a = torch.ones(21) if source is None else source[b, 0].sum(0)
        assert kept(selection, b) == set(naive_scope(x, a, alpha, count))
    assert pruner.needs == (
        ({"tower_features"} if feature == "tower" else set())
        | {"class": {"tower_cls"}, "received": {"tower_received"}, "none": set()}[attention]
    )


def test_scope_order() -> None:
    x, a = torch.randn(1, 17, 8), torch.rand(1, 17)
    order = salient_cover(cosines(x), a, torch.ones(1, 17, dtype=torch.bool), 9)
    assert picks(order[0]) == naive_scope(x[0], a[0], 1.0, 9)


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


# ------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("config", [{"type": name} for name in RULES], ids=str)
def test_duplicates_are_told_apart_by_position_alone(config: dict[str, Any]) -> None:
    """Many exact ties: padding, batch and threads may not break them another way."""
    pruner = make_pruner(config)
    x = torch.randn(2, 6, 16)[:, torch.arange(24) % 6]
    view = make_view(pruner, x, (4, 6))
    fields = {k: v for k, v in vars(view).items() if isinstance(v, Tensor) and k.startswith(("tower", "attention"))}
    view = replace(view, **{k: torch.full_like(v, 1 / 32) for k, v in fields.items() if "features" not in k})
    if view.tower_features_BLVD is not None:
        view = replace(view, tower_features_BLVD=x[:, None])
    for counts in itertools.product([1, 5, 6, 7, 20], repeat=2):
        count = torch.tensor(counts)
        whole = pruner(view, count).keep_BV
        assert torch.equal(pruner(pad_view(view, 5, (6, 7)), count).keep_BV[:, :24], whole)
        for b in range(2):
            assert torch.equal(pruner(view_rows(view, [b]), count[b : b + 1]).keep_BV[0], whole[b])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "cdpruner", "relevance": "words"}, "cdpruner has no relevance 'words'; choose one of text, joint"),
        ({"type": "scope", "alpha": -1}, "scope needs alpha of at least 0, got -1"),
        ({"type": "scope", "feature": "keys"}, "scope has no feature 'keys'; choose one of tower, tokens"),
        ({"type": "scope", "attention": "all"}, "scope has no attention source 'all'"),
        ({"type": "tops", "coverage": -0.5}, "tops needs weights of at least 0, got coverage -0.5"),
        ({"type": "tops", "relevance": "all"}, "tops has no relevance 'all'; choose one of class, received, raters"),
        ({"type": "tops", "normalise": "max"}, "tops cannot normalise by 'max'; choose one of minmax, mean"),
        ({"type": "eadp", "mu": 2}, "eadp needs mu in .* got mu 2 and q 0.5"),
        ({"type": "eadp", "tau": 0}, "eadp needs beta >= 0, tau > 0 and gamma > 0, got 1.0, 0 and 0.01"),
        ({"type": "eadp", "relevance": "clip"}, "eadp has no relevance 'clip'; choose one of text, joint"),
        ({"type": "sieve", "energy": 0}, "sieve needs energy and heads in .* got 0 and 0.375"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(config)


def test_stretch_is_what_the_naive_rules_use() -> None:
    x = torch.rand(1, 9)
    expected = (x - x.min() + 1e-6) / (x.max() - x.min() + 1e-6)
    assert torch.allclose(stretch(x, torch.ones(1, 9, dtype=torch.bool)), expected)
