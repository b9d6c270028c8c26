"""VisionZip and PruMerge against slow versions of their formulas: loops, one sample, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import make_pruner, make_view, pad_view, view_rows
from torch import Tensor

from tpcompress.pruners import Selection, TokenView, create
from tpcompress.pruners.prumerge import class_attention, every_third, nearest, spread, upper_outliers
from tpcompress.pruners.visionzip import every_nth, joins

D = 16
Merged = tuple[list[int], dict[int, np.ndarray]]
"""Retained tokens, and the new values of those that absorb others."""


def view_for(config: dict[str, Any], B: int, V: int) -> TokenView:
    return make_view(make_pruner(config), torch.randn(B, V, D, generator=torch.Generator().manual_seed(2)))


def best(score: Any, count: int, of: Any = None) -> list[int]:
    """Places of the largest scores, ties to the earlier one."""
    return sorted(range(len(score)) if of is None else of, key=lambda i: (-float(score[i]), i))[: max(count, 0)]


def cosines(x: Tensor) -> np.ndarray:
    a = x.double().numpy()
    a = a / np.linalg.norm(a, axis=-1, keepdims=True)
    return a @ a.T


def compare(selection: Selection, view: TokenView, b: int, expected: Merged, merge_at: str) -> None:
    """Row b retains the expected tokens, with the expected values; nothing else has changed a bit."""
    keep, values = expected
    assert selection.keep_BV[b].nonzero().flatten().tolist() == keep
    for v in range(view.vision_BVD.shape[1]):
        if v in values:
            merged = torch.tensor(values[v])
            new = view.project(merged) if merge_at == "features" else merged
            assert torch.allclose(selection.vision_BVD[b, v].double(), new, atol=1e-4)
        else:
            assert torch.equal(selection.vision_BVD[b, v], view.vision_BVD[b, v])


# --------------------------------------------------------------------------------------------------------- VisionZip


def naive_visionzip(a: Tensor, keys: Tensor, h: Tensor, k: int, share: float, compat: bool = False) -> Merged:
    """Dominant patches; every (M // C)-th of the others as targets; target + mean of those most similar to it."""
    similar, x = cosines(keys.double().mean(0)), h.double().numpy()
    count = min(int(np.floor(k * share + 0.5)), k - 1)
    dominant = best(a, k - count - compat)
    rest = [i for i in range(len(a)) if i not in dominant]
    targets = rest[:: max(len(rest) // count, 1)][:count] if count else []
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in (i for i in rest if i not in targets and targets):
        members[max(targets, key=lambda t: (similar[i, t], -t))].append(i)
    values = {t: x[t] + x[m].mean(0) for t, m in members.items() if m}
    return sorted(dominant + targets), values


@pytest.mark.parametrize("merge_at", ["features", "tokens"])
@pytest.mark.parametrize("source", ["class", "received"])
@pytest.mark.parametrize(("V", "share"), [(1, 0.15625), (2, 0.5), (24, 0.15625), (23, 0.4), (23, 1.0), (24, 0.0)])
def test_visionzip(V: int, share: float, source: str, merge_at: str) -> None:
    config = {"type": "visionzip", "contextual": share, "attention": source, "merge_at": merge_at}
    view = view_for(config, V, V)
    assert (view.projector_BVC is None) == (merge_at == "tokens")
    selection = create(config)(view, torch.arange(1, V + 1))
    attention = view.tower_cls_BLHV if source == "class" else view.tower_received_BLHV
    for b in range(V):
        h = view.vision_BVD[b] if merge_at == "tokens" else view.projector_BVC[b]
        expected = naive_visionzip(attention[b, 0].mean(0), view.tower_keys_BLHVD[b, 0], h, b + 1, share)
        compare(selection, view, b, expected, merge_at)
        assert len(expected[0]) == b + 1


def test_visionzip_has_the_papers_counts() -> None:
    view = view_for({"type": "visionzip"}, 1, 576)
    a = view.tower_cls_BLHV[0, 0].mean(0)
    for total, dominant in ((64, 54), (128, 108), (192, 162)):
        keep = create("visionzip")(view, torch.tensor([total])).keep_BV[0].nonzero().flatten().tolist()
        assert len(keep) == total
        assert set(best(a, dominant)) <= set(keep)
        targets = [i for i in range(576) if i not in best(a, dominant)]
        targets = targets[:: len(targets) // (total - dominant)][: total - dominant]
        assert sorted(best(a, dominant) + targets) == keep


def test_visionzip_compat_leaves_the_slot_of_the_class_token() -> None:
    config = {"type": "visionzip", "compat": True}
    pruner, view = make_pruner(config), view_for(config, 24, 24)
    assert not pruner.exact_count
    selection = pruner(view, torch.arange(1, 25))
    for b in range(24):
        arguments = view.tower_cls_BLHV[b, 0].mean(0), view.tower_keys_BLHVD[b, 0], view.projector_BVC[b]
        compare(selection, view, b, naive_visionzip(*arguments, b + 1, 0.15625, compat=True), "features")
    assert selection.keep_BV.sum(1).tolist() == list(range(24))


def test_visionzip_adds_the_mean_of_the_members() -> None:
    """As the paper's listing has it: the norm of a contextual token is about that of two tokens."""
    x = torch.ones(1, 8, D)
    view = make_view(make_pruner({"type": "visionzip"}), x)
    selection = create({"type": "visionzip", "contextual": 0.5, "merge_at": "tokens"})(view, torch.tensor([2]))
    assert sorted(selection.vision_BVD[selection.keep_BV][:, 0].tolist()) == [1.0, 2.0]


def test_visionzip_parts() -> None:
    rest = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0, 1, 0]]).bool()
    assert every_nth(rest, torch.tensor([3, 5])).long().tolist() == [
        [1, 0, 0, 1, 0, 1, 0, 0, 0],
        rest[1].long().tolist(),
    ]
    assert not every_nth(rest, torch.tensor([0, 0])).any()
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 3.0], [0.1, 1.0]]])
    target = torch.tensor([[True, True, False, False, False]])
    weights = joins(keys, target, ~target, 3)
    assert weights[0].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5], [0, 0, 0, 0, 0]], "a tie joins the earlier"


# ---------------------------------------------------------------------------------------------------------- PruMerge


def naive_attention(view: TokenView, b: int) -> np.ndarray:
    """Softmax over the patches of q . k / sqrt(C), all heads as one."""
    q, k = (
        x[b, 0].double().transpose(0, 1).flatten(1).numpy() for x in (view.tower_cls_query_BLHVD, view.tower_keys_BLHVD)
    )
    logits = (q * k).sum(-1) / np.sqrt(k.shape[-1])
    return np.exp(logits) / np.exp(logits).sum()


def naive_merge(a: np.ndarray, keys: Tensor, h: Tensor, kept: list[int], neighbours: int) -> Merged:
    """Kept: h + sum of a h over the nearest others; the best of the rest: sum of a h over the rest."""
    similar, x = cosines(keys.transpose(0, 1).flatten(1)), h.double().numpy()
    rest = [i for i in range(len(a)) if i not in kept]
    extra = best(a, 1, rest)
    if len(rest) < 2:
        return sorted(kept + extra), {}
    near = {p: best(similar[p], neighbours, [i for i in range(len(a)) if i != p]) for p in kept}
    values = {p: x[p] + sum((a[n] * x[n] for n in near[p]), np.zeros(x.shape[1])) for p in kept}
    values[extra[0]] = sum(a[i] * x[i] for i in rest)
    return sorted(kept + extra), values


def naive_kept(a: np.ndarray, k: int, plus: bool, uniform: float) -> list[int]:
    count = int(np.floor(k * uniform)) if plus else 0
    kept = best(a, k - count)
    rest = [i for i in range(len(a)) if i not in kept]
    return kept + [rest[i * len(rest) // count] for i in range(min(count, len(rest)))]


@pytest.mark.parametrize("merge_at", ["features", "tokens"])
@pytest.mark.parametrize(("plus", "uniform"), [(False, 0.75), (True, 0.75), (True, 1.0)])
@pytest.mark.parametrize(("V", "neighbours"), [(1, 32), (2, 32), (23, 4), (24, 32), (7, 0)])
@pytest.mark.parametrize("compat", [False, True])
def test_prumerge(V: int, neighbours: int, plus: bool, uniform: float, merge_at: str, compat: bool) -> None:
    config = {"type": "prumerge", "plus": plus, "uniform": uniform, "neighbours": neighbours, "merge_at": merge_at}
    if compat and plus:
        return  # tests/pruners/test_official_behaviour.py
    pruner, view = make_pruner(config | {"compat": compat}), view_for(config, V, V)
    assert pruner.exact_count != compat
    selection = pruner(view, torch.arange(1, V + 1))
    for b in range(V):
        a = naive_attention(view, b)
        kept = naive_kept(a, b + compat, plus, uniform)
        h = view.vision_BVD[b] if merge_at == "tokens" else view.projector_BVC[b]
        expected = naive_merge(a, view.tower_keys_BLHVD[b, 0], h, kept, neighbours)
        compare(selection, view, b, expected, merge_at)
        assert len(expected[0]) == min(b + 1 + compat, V)


def test_prumerge_by_received_attention() -> None:
    config = {"type": "prumerge", "attention": "received"}
    view = view_for(config, 1, 23)
    a = view.tower_received_BLHV[0, 0].double().mean(0).numpy()
    expected = naive_merge(a, view.tower_keys_BLHVD[0, 0], view.projector_BVC[0], best(a, 5), 32)
    compare(create(config)(view, torch.tensor([6])), view, 0, expected, "features")


@pytest.mark.parametrize("plus", [False, True])
def test_prumerge_counts_outliers_row_by_row(plus: bool) -> None:
    """The official code takes quartiles over the whole batch, so that an image's count depends on its neighbours'."""
    config = {"type": "prumerge", "adaptive": True, "plus": plus}
    pruner, view = make_pruner(config), view_for(config, 3, 60)
    sharp = view.tower_cls_query_BLHVD * torch.tensor([0.3, 1.0, 3.0])[:, None, None, None, None]
    view = replace(view, tower_cls_query_BLHVD=sharp)
    together, counts = pruner(view, torch.tensor([1, 1, 1])), []
    attention = np.stack([naive_attention(view, b) for b in range(3)])
    for b in range(3):
        q1, q3 = np.percentile(attention[b], [25, 75])
        kept = [i for i in range(60) if attention[b, i] > q3 + 1.5 * (q3 - q1)]
        stride = max(60 // len(kept) // 3, 1) if kept else 60
        kept = sorted(set(kept) | set(range(0, 59, stride))) if plus and kept else kept
        expected = naive_merge(attention[b], view.tower_keys_BLHVD[b, 0], view.projector_BVC[b], kept, 32)
        compare(together, view, b, expected, "features")
        alone = pruner(view_rows(view, [b]), torch.tensor([1]))
        assert torch.equal(alone.keep_BV[0], together.keep_BV[b])
        counts.append(len(kept))
    q1, q3 = np.percentile(attention, [25, 75])
    assert (attention > q3 + 1.5 * (q3 - q1)).sum(1).tolist() != counts, "control: a threshold of the batch differs"
    padded = pruner(pad_view(view, 9, (1, 69)), torch.tensor([1, 1, 1]))
    assert torch.equal(padded.keep_BV[:, :60], together.keep_BV)


def test_prumerge_parts() -> None:
    assert not upper_outliers(torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool)).any()
    g, valid = torch.Generator().manual_seed(0), torch.ones(9, 31, dtype=torch.bool)
    for b in range(9):
        valid[b, 22 + b :] = False
    scores = torch.randn(9, 31, generator=g) ** 3
    for b, n in enumerate(range(22, 31)):
        q1, q3 = np.percentile(scores[b, :n].double(), [25, 75])
        assert upper_outliers(scores, valid)[b, :n].tolist() == (scores[b, :n] > q3 + 1.5 * (q3 - q1)).tolist()
    rest = torch.rand(30, 31, generator=g) < 0.6
    rest[0] = False
    for count in range(32):
        chosen = spread(rest, torch.full((30,), count))
        for b, row in enumerate(rest):
            places = row.nonzero().flatten().tolist()
            many = min(count, len(places))
            assert chosen[b].nonzero().flatten().tolist() == [places[i * len(places) // many] for i in range(many)]
    outlier = torch.arange(31)[None] < 2
    third = every_third(outlier, torch.ones(1, 31, dtype=torch.bool))
    assert third[0].nonzero().flatten().tolist() == list(range(0, 30, 5)), "the last place, 30, is never one of them"
    assert not every_third(outlier & False, torch.ones(1, 31, dtype=torch.bool)).any()
    x = torch.randn(1, 6, 4, generator=g)
    near = nearest(x, torch.tensor([[2]]), torch.tensor([[True] * 5 + [False]]), 32)
    assert near[0, 0].tolist() == [True, True, False, True, True, False], "neither itself nor padding"
    a = class_attention(x, x, torch.tensor([[True] * 5 + [False]]))
    assert a[0, 5] == 0
    assert torch.allclose(a.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "visionzip", "contextual": 2}, "visionzip needs contextual between 0 and 1, got 2"),
        (
            {"type": "visionzip", "merge_at": "layer"},
            "visionzip cannot merge at 'layer'; choose one of features, tokens",
        ),
        ({"type": "prumerge", "neighbours": -1}, "prumerge merges 0 or more neighbours, got -1"),
        ({"type": "prumerge", "attention": "text"}, "prumerge has no attention source 'text'"),
        ({"type": "prumerge", "uniform": -0.5}, "prumerge needs uniform between 0 and 1"),
    ],
)
def test_refuses_arguments(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(config)


@pytest.mark.parametrize("name", ["visionzip", "prumerge"])
def test_gradients_reach_what_is_merged_behind_the_projector(name: str) -> None:
    config = {"type": name, "merge_at": "tokens"}
    view = view_for(config, 2, 23)
    x = view.vision_BVD.clone().requires_grad_()
    selection = create(config)(replace(view, vision_BVD=x), torch.tensor([7, 9]))
    selection.vision_BVD[selection.keep_BV].sum().backward()
    assert (x.grad.abs().sum(-1) > 0)[~selection.keep_BV].any()
    assert not selection.scores_BV.requires_grad
