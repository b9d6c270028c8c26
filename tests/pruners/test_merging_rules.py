"""ToMe, ToFu, merged pruners and RESTORE: groups from loops over one row, and what a model makes of their answers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
from pruners.test_merge import cosine, naive_groups, naive_matching
from support import batch, config_id, make_pruner, make_view, pad_view, tiny_model, view_rows
from torch import Tensor

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Selection, create
from tpcompress.pruners.restore import distinctive

D = 16
CONFIGS: list[dict[str, Any]] = [
    {"type": "tome"},
    {"type": "tome", "metric": "keys", "proportional": False},
    {"type": "tofu"},
    {"type": "tofu", "metric": "keys", "proportional": False},
    {"type": "tofu", "mode": "prune"},
    {"type": "merged"},
    {"type": "merged", "pruner": {"type": "fastv"}, "weights": "similarity", "proportional": True},
    {"type": "merged", "pruner": {"type": "random", "seed": 3}, "metric": "keys"},
    {"type": "restore"},
    {"type": "restore", "pruner": {"type": "random"}, "weights": "similarity", "place": "own", "proportional": False},
    {"type": "restore", "pruner": {"type": "fastv"}, "anchors": 0.25},
    {"type": "restore", "anchors": 0.9, "proportional": False},
]
GRIDS = {1: (1, 1), 2: (1, 2), 13: (1, 13), 15: (3, 5)}

every_rule = pytest.mark.parametrize("config", CONFIGS, ids=config_id)


def features(B: int, V: int, seed: int = 0) -> Tensor:
    rows = [torch.randn(V, D, generator=torch.Generator().manual_seed(seed + 100 * b)) for b in range(B)]
    return torch.stack(rows)


def answer(config: dict[str, Any], x: Tensor, counts: list[int]) -> Selection:
    pruner = make_pruner(config)
    with torch.no_grad():
        return pruner(make_view(pruner, x, GRIDS[x.shape[1]]), torch.tensor(counts))


@every_rule
@pytest.mark.parametrize("V", GRIDS)
def test_sizes_count_every_token_once_and_places_are_all_different(config: dict[str, Any], V: int) -> None:
    counts = list(range(1, V + 1))
    selection = answer(config, features(V, V), counts)
    assert selection.keep_BV.sum(1).tolist() == counts
    assert make_pruner(config).uses_token_sizes == (selection.size_BV is not None or selection.place_BV is not None)
    for b in range(V):
        kept = selection.keep_BV[b]
        if selection.size_BV is not None:
            assert selection.size_BV.dtype == torch.float32
            assert selection.size_BV[b, kept].sum() == V
        if selection.place_BV is not None:
            assert selection.place_BV.dtype == torch.long
            assert len(selection.place_BV[b, kept].unique()) == b + 1
    if selection.vision_BVD is not None:
        assert torch.equal(selection.vision_BVD[-1], features(V, V)[-1]), "a full budget changes no bit"


@every_rule
def test_a_full_budget_changes_no_bit_of_any_dtype(config: dict[str, Any]) -> None:
    pruner = make_pruner(config)
    view = make_view(pruner, features(2, 13), GRIDS[13])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = features(2, 13).to(dtype) * 1.2345678901
        selection = pruner(replace(view, vision_BVD=x), torch.tensor([13, 20]))
        assert selection.keep_BV.all()
        if selection.vision_BVD is not None:
            assert selection.vision_BVD.dtype == dtype
            assert torch.equal(selection.vision_BVD, x)
        if selection.size_BV is not None:
            assert (selection.size_BV == 1).all()
        if selection.place_BV is not None:
            assert torch.equal(selection.place_BV, torch.arange(13).expand(2, -1))


@every_rule
def test_padding_and_partners_change_nothing(config: dict[str, Any]) -> None:
    pruner, counts = make_pruner(config), torch.tensor([1, 4, 9, 13])
    view = make_view(pruner, features(4, 13), GRIDS[13])
    with torch.no_grad():
        plain, padded = pruner(view, counts), pruner(pad_view(view, 4, (1, 17)), counts)
        alone = [pruner(view_rows(view, [b]), counts[b : b + 1]) for b in range(4)]
    for name in ("keep_BV", "size_BV", "place_BV"):
        whole = getattr(plain, name)
        if whole is not None:
            assert torch.equal(getattr(padded, name)[:, :13], whole)
            assert all(torch.equal(getattr(alone[b], name)[0], whole[b]) for b in range(4))
    assert not padded.keep_BV[:, 13:].any()
    if plain.vision_BVD is not None:
        assert torch.allclose(padded.vision_BVD[:, :13], plain.vision_BVD, atol=1e-5)
        assert all(torch.allclose(alone[b].vision_BVD[0], plain.vision_BVD[b], atol=1e-5) for b in range(4))


@every_rule
@pytest.mark.parametrize("kind", ["zero", "constant", "peaky", "tiny", "duplicated"])
def test_awkward_tokens_stay_finite(config: dict[str, Any], kind: str) -> None:
    x = features(13, 13)
    x = {
        "zero": x * 0,
        "constant": torch.full_like(x, 0.3),
        "peaky": x * torch.tensor([1e3] * 12 + [1e7])[:, None],
        "tiny": x * 1e-8,
        "duplicated": x[:, :1].expand_as(x).clone(),
    }[kind].requires_grad_()
    pruner = make_pruner(config).train()
    selection = pruner(make_view(pruner, x, GRIDS[13]), torch.arange(1, 14))
    assert selection.keep_BV.sum(1).tolist() == list(range(1, 14))
    assert selection.scores_BV.isfinite().all()
    for b, keep in enumerate(selection.keep_BV):
        least, best = selection.scores_BV[b, keep].min(), selection.scores_BV[b, ~keep]
        assert best.numel() == 0 or best.max() <= least or config["type"] in ("merged", "restore")
    if selection.vision_BVD is not None:
        assert selection.vision_BVD.isfinite().all()
        selection.vision_BVD.sum().backward()
        assert x.grad.isfinite().all()


def naive_metric(view: Any, b: int, metric: str) -> Tensor:
    return view.vision_BVD[b] if metric == "features" else view.tower_keys_BLHVD[b, 0].mean(0)


@pytest.mark.parametrize("metric", ["features", "keys"])
@pytest.mark.parametrize("V", [1, 2, 13, 15])
def test_tome_averages_what_its_rounds_put_together(V: int, metric: str) -> None:
    pruner = make_pruner({"type": "tome", "metric": metric})
    x = features(V, V)
    view = make_view(pruner, x, GRIDS[V])
    selection = pruner(view, torch.arange(1, V + 1))
    for b in range(V):
        group = naive_matching(naive_metric(view, b, metric), b + 1, average=True)
        assert selection.keep_BV[b].nonzero().flatten().tolist() == sorted(set(group))
        for v in set(group):
            inside = [w for w in range(V) if group[w] == v]
            assert torch.allclose(selection.vision_BVD[b, v], x[b, inside].mean(0), atol=1e-5)
            assert selection.size_BV[b, v] == len(inside)


@pytest.mark.parametrize("mode", ["prune", "merge"])
@pytest.mark.parametrize("V", [1, 2, 13, 15])
def test_tofu_drops_pairs_or_merges_them_at_their_norm(V: int, mode: str) -> None:
    x = features(V, V) * torch.linspace(0.2, 3, V)[:, None]
    selection = answer({"type": "tofu", "mode": mode}, x, list(range(1, V + 1)))
    for b in range(V):
        group = naive_matching(x[b], b + 1, average=mode == "merge")
        assert selection.keep_BV[b].nonzero().flatten().tolist() == sorted(set(group))
        if mode == "prune":
            assert selection.vision_BVD is None
            assert selection.size_BV is None
            continue
        for v in set(group):
            inside = x[b, [w for w in range(V) if group[w] == v]]
            mean = inside.mean(0)
            expected = mean / mean.norm() * inside.norm(dim=1).max() if len(inside) > 1 else mean
            assert torch.allclose(selection.vision_BVD[b, v], expected, atol=1e-4)


@pytest.mark.parametrize("metric", ["features", "keys"])
@pytest.mark.parametrize("weights", ["mean", "similarity"])
def test_merged_keeps_what_its_pruner_keeps_and_merges_the_rest(metric: str, weights: str) -> None:
    config = {"type": "merged", "metric": metric, "weights": weights, "proportional": True}
    pruner, x, counts = make_pruner(config), features(13, 13), torch.arange(1, 14)
    view = make_view(pruner, x, GRIDS[13])
    selection, inner = pruner(view, counts), create("divprune")(view, counts)
    assert torch.equal(selection.keep_BV, inner.keep_BV)
    assert torch.equal(selection.scores_BV, inner.scores_BV)
    for b in range(13):
        measure, kept = naive_metric(view, b, metric), inner.keep_BV[b].nonzero().flatten().tolist()
        group = naive_groups(measure, kept)
        for v in kept:
            inside = [w for w in range(13) if group[w] == v]
            share = [1.0 if w == v or weights == "mean" else max(0.0, cosine(measure[w], measure[v])) for w in inside]
            expected = sum(s * x[b, w] for s, w in zip(share, inside, strict=True)) / sum(share)
            assert torch.allclose(selection.vision_BVD[b, v], expected, atol=1e-5)
            assert selection.size_BV[b, v] == len(inside)


def test_a_part_and_the_metric_may_read_other_layers_of_the_tower() -> None:
    part = create("divprune")
    part.__class__ = type("Deep", (type(part),), {"tower_layers": (4, -3), "needs": frozenset({"tower_keys"})})
    pruner = create({"type": "merged", "metric": "keys", "pruner": part})
    assert pruner.tower_layers == (4, -3, -2)
    view = make_view(pruner, features(1, 13), GRIDS[13])
    plain = create({"type": "merged", "metric": "keys"})
    last = replace(view, tower_keys_BLHVD=view.tower_keys_BLHVD[:, 2:])
    count = torch.tensor([5])
    assert torch.equal(pruner(view, count).vision_BVD, plain(last, count).vision_BVD)


@pytest.mark.parametrize("anchors", [0.0, 0.4, 0.5, 0.9])
def test_restore_merges_into_anchors_at_the_median_of_their_groups(anchors: float) -> None:
    pruner, x, counts = make_pruner({"type": "restore", "anchors": anchors}), features(13, 13), torch.arange(1, 14)
    view = make_view(pruner, x, GRIDS[13])
    selection = pruner(view, counts)
    for b in range(13):
        own = max(1, floor(Fraction(b + 1) * (1 - Fraction(str(anchors)))))
        inner = create("divprune")(view_rows(view, [b]), torch.tensor([own])).keep_BV[0]
        kept, target = inner.nonzero().flatten().tolist(), inner.nonzero().flatten().tolist()
        rest = [v for v in range(13) if v not in kept]
        near = {v: {w: cosine(x[b, v], x[b, w]) for w in rest} for v in rest}
        central = {v: sum(near[v].values()) for v in rest}
        covered = {v: max([0.0, *(near[v][w] for w in rest if central[w] > central[v])]) for v in rest}
        best = sorted(rest, key=lambda v: (-central[v] * (1 - covered[v]), v))[: b + 1 - own]
        kept, target = sorted(kept + best), sorted(best or target)
        assert selection.keep_BV[b].nonzero().flatten().tolist() == kept
        group = [v if v in kept else max(target, key=lambda k: (cosine(x[b, v], x[b, k]), -k)) for v in range(13)]
        for v in kept:
            inside = [w for w in range(13) if group[w] == v]
            assert torch.allclose(selection.vision_BVD[b, v], x[b, inside].mean(0), atol=1e-5)
            assert selection.size_BV[b, v] == len(inside)
            assert selection.place_BV[b, v] == inside[(len(inside) - 1) // 2]


def test_of_equal_tokens_only_the_first_is_distinctive() -> None:
    x = features(2, 9)[:, torch.arange(27) % 9]
    valid = torch.ones(2, 27, dtype=torch.bool)
    scores = distinctive(x, valid)
    assert (scores[:, :9] != 0).all()
    assert (scores[:, 9:].abs() < 1e-5).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "tome", "metric": "values"}, "tome has no metric 'values'; choose one of features, keys"),
        ({"type": "tofu", "mode": "hybrid"}, "choose one of prune, merge .hybrid: an early stage prunes, a late"),
        ({"type": "merged", "weights": "size"}, "merged has no weights 'size'; choose one of mean, similarity"),
        ({"type": "restore", "anchors": 1.0}, "0 <= anchors < 1, a share of the budget, got 1.0"),
        ({"type": "restore", "place": "mean"}, "restore has no place 'mean'; choose one of median, own"),
        ({"type": "restore", "weights": "size"}, "restore has no weights 'size'"),
        ({"type": "merged", "pruner": "pool"}, "merged cannot build on 'pool', which merges"),
        ({"type": "restore", "pruner": "tome"}, "restore cannot build on 'tome', which merges"),
    ],
)
def test_refusals_say_what_is_possible(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create(config)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_model_runs_with_what_they_answer(config: dict[str, Any], family: str) -> None:
    layer = 2 if "fastv" in str(config) else 0
    inputs = batch([(5, 1, 7), (3, 2, 8)], family=family)
    model = attach(tiny_model(family), PruningPlan([Stage(config, layer, keep_tokens=11)]))
    with record(model) as trace, torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    note = trace.stages[0]
    assert note.vision_out == [11] * 3
    assert note.selection is not None
    if note.selection.size_BV is not None:
        kept = note.selection.keep_BV
        assert (note.selection.size_BV * kept).sum(1).tolist() == note.vision_in
