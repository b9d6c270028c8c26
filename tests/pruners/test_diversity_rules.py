"""Pruners that pick one token after another, each against its formula, written with loops for one sample."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import make_pruner, make_view, pad_view, view_rows
from torch import Tensor

from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.cdpruner import likeliest, mean_cosine
from tpcompress.pruners.divprune import farthest_points
from tpcompress.pruners.greedy import cosines, stretch
from tpcompress.pruners.scope import salient_cover

RULES = ("divprune", "cdpruner", "scope", "tops", "eadp", "sieve")


@pytest.mark.parametrize("name", RULES)
def test_recipe(name: str) -> None:
    plan = PruningPlan.of(Path(__file__).parents[2] / "recipes" / "free" / f"{name}.yaml")
    assert {stage.pruner.name for stage in plan.stages} == {name}


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
    assert compat.exact_count is False
    assert ours.exact_count is True
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
