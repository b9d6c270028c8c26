"""MMR against a loop over one sample, and what it promises of its picks."""

from __future__ import annotations

import pytest
import torch
from pruners.test_combinators import Ranks
from support import make_view, pad_view
from torch import Tensor

from tpcompress.pruners import TokenView, create
from tpcompress.pruners.mmr import MMR, marginal_picks

D, V = 16, 30


def loop(x_VD: Tensor, w_V: Tensor, k: int, alpha: float, q: int = 1) -> list[int]:
    """Steps 1 to 5 of the formula, one token at a time, in fp64."""
    w_V = w_V.detach()
    w = [(float(r) - float(w_V.min())) / (float(w_V.max()) - float(w_V.min()) + 1e-6) for r in w_V]
    near: list[float] = [-2.0] * len(w)
    unit = [x / (x.norm() + 1e-8) for x in x_VD.double()]
    picked: list[int] = []
    while len(picked) < k:
        value = [wi if not picked else alpha * wi - (1 - alpha) * m for wi, m in zip(w, near, strict=True)]
        left = sorted((i for i in range(len(w)) if i not in picked), key=lambda i: (-value[i], i))
        new = left[: min(q, k - len(picked))]
        picked += new
        for i in range(len(w)):
            near[i] = max([near[i], *(float(unit[i] @ unit[p]) for p in new)])
    return picked


def scene(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, V, D, generator=g), torch.randn(3, V, generator=g) * 7 + 2


def rule(w_BV: Tensor, **arguments: float) -> MMR:
    inner = Ranks()
    inner.scores_BV = w_BV
    return MMR(inner, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "q"), [(0.5, 1), (0.9, 1), (0.2, 1), (0.5, 4)])
def test_picks_are_those_of_the_formula(alpha: float, q: int) -> None:
    x, w = scene()
    order, _ = marginal_picks(x, w, torch.ones(3, V, dtype=torch.bool), V, alpha, q)
    for b in range(3):
        assert order[b].argsort().tolist() == loop(x[b], w[b], V, alpha, q)
        assert sorted(order[b].tolist()) == list(range(V))


def test_the_ends_of_alpha() -> None:
    """1: the top-k of the scores, ties included; 0: the farthest point from the best token on."""
    x, w = scene(1)
    w = w.round()  # many ties
    view = TokenView.of(x)
    for k in (1, 7, 20):
        counts = torch.full((3,), k)
        expected = torch.stack(
            [torch.zeros(V).bool().index_fill(0, r.argsort(descending=True, stable=True)[:k], True) for r in w]
        )
        assert torch.equal(rule(w, alpha=1.0)(view, counts).keep_BV, expected)
    far = marginal_picks(x, w, view.valid_BV, 9, 0.0)[0]
    for b in range(3):
        picks = [int(w[b].argmax())]
        unit = torch.nn.functional.normalize(x[b].double(), dim=-1)
        while len(picks) < 9:
            near = (unit @ unit[picks].T).amax(1)
            near[picks] = 2
            picks.append(int(near.argmin()))
        assert far[b].argsort()[:9].tolist() == picks


def test_scale_and_offset_of_the_scores_do_not_matter() -> None:
    x, w = scene(2)
    view, counts = TokenView.of(x), torch.tensor([4, 9, 20])
    expected = rule(w)(view, counts).keep_BV
    assert torch.equal(rule(3 * w + 8)(view, counts).keep_BV, expected)


def test_smaller_budgets_are_the_first_picks_of_larger_ones() -> None:
    x, w = scene(3)
    view, pruner = TokenView.of(x), rule(w)
    kept = [pruner(view, torch.full((3,), k)).keep_BV for k in range(1, V + 1)]
    assert all((small & ~large).sum() == 0 for small, large in zip(kept, kept[1:], strict=False))


def test_a_copy_comes_after_everything_that_is_not_one() -> None:
    x, _ = scene(4)
    x[:, 1] = 3 * x[:, 0]
    order, _ = marginal_picks(x, torch.ones(3, V), torch.ones(3, V, dtype=torch.bool), V)
    assert order[:, 0].tolist() == [0] * 3, "of equal scores the earlier token"
    assert order[:, 1].tolist() == [V - 1] * 3


def test_order_of_the_tokens_and_padding_do_not_matter() -> None:
    x, w = scene(5)
    mixed = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([4, 9, 20])
    plain = rule(w)(TokenView.of(x), counts).keep_BV
    assert torch.equal(rule(w[:, mixed])(TokenView.of(x[:, mixed]), counts).keep_BV, plain[:, mixed])
    padded = rule(torch.cat([w, torch.full((3, 4), 99.0)], 1))
    assert torch.equal(padded(pad_view(TokenView.of(x), 4, (1, V + 4)), counts).keep_BV[:, :V], plain)


def test_features_are_those_that_are_named() -> None:
    for feature, field in (("keys", "tower_keys_BLHVD"), ("tower", "tower_features_BLVD")):
        pruner = create({"type": "mmr", "pruner": "fastervlm", "feature": feature})
        x, _ = scene()
        view = make_view(pruner, x)
        values = getattr(view, field)[:, 0]
        features = values.mean(1) if feature == "keys" else values
        scores = view.tower_cls_BLHV[:, 0].mean(1)
        kept = pruner(view, torch.tensor([6, 6, 6])).keep_BV
        for b in range(3):
            assert sorted(kept[b].nonzero()[:, 0].tolist()) == sorted(loop(features[b], scores[b], 6, 0.5))
