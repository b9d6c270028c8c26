"""SparseVLM's counts and clusters, and the whole rule alone and inside a model, against slow versions of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact import check
from insertion.views.test_views import rows
from pruners.test_attention_rules import RECYCLES, SAMPLES, D, V, best, features, kept, slow_raters, view_for
from support import batch, config_id, make_pruner, view_rows
from torch import Tensor

from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.base import INSTRUCTION
from tpcompress.pruners.sparsevlm import (
    RANKED,
    density_peaks,
    dropped_for,
    merge_clusters,
    question,
    recycled,
    sparsevlm_stages,
    text_raters,
)

# -------------------------------------------------------------------------------------- counts, clusters


def test_recycled_counts() -> None:
    for n in range(1, 3000):
        num = int(n * 0.3) + 1
        assert recycled(n) == (num, int(num / 10) + 1)
        assert recycled(n)[1] <= recycled(n)[0] <= n
    assert recycled(0) == (0, 0)
    assert [t.tolist() for t in recycled(torch.tensor([0, 1, 276]))] == [[0, 1, 83], [0, 1, 9]]


def test_official_stages_split_as_there() -> None:
    """The exact budget of each official stage, recycled tokens included, ranks as many tokens as it does there."""
    for tokens, ranked in RANKED["1.5"].items():
        seen = 576
        for (_, count), by_rank in zip(sparsevlm_stages(tokens), ranked, strict=True):
            gone = dropped_for(torch.tensor([count]), torch.tensor([seen]), seen)
            assert seen - int(gone) == by_rank
            seen = count
    assert sparsevlm_stages(64) == [(3, 82), (7, 32), (16, 18)]
    assert sparsevlm_stages(192, "2") == [(3, 300), (7, 200), (16, 118)]
    for version, table in RANKED.items():
        for tokens in table:
            counts = [count for _, count in sparsevlm_stages(tokens, version)]
            average = sum(n * layers for n, layers in zip([576, *counts], (2, 4, 9, 17), strict=True)) / 32
            assert tokens <= average < tokens + 1
    for wrong in ((100, "1.5"), (64, "3")):
        with pytest.raises(ValueError, match="SparseVLM has no stages for"):
            sparsevlm_stages(*wrong)


@pytest.mark.parametrize("total", [1, 2, 3, 11, 40, 97])
def test_clusters_fill_the_budget(total: int) -> None:
    counts = torch.arange(1, total + 1)
    for width in (total, total + 13):
        gone = dropped_for(counts, torch.full_like(counts, total), width)
        for count, n in zip(counts.tolist(), gone.tolist(), strict=True):
            exact = [m for m in range(total) if total - m + recycled(m)[1] == count]
            assert n == (exact[0] if exact else total - 1)
            assert 0 <= count - (total - n) <= recycled(n)[1]


def slow_density_peaks(x: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    """(tokens by falling rho delta, the peak that each token joins), with the exp that we leave out."""
    n = len(x)
    d = np.array([[np.sqrt(((x[i] - x[j]) ** 2).sum()) for j in range(n)] for i in range(n)]) / np.sqrt(x.shape[1])
    rho = [np.exp(-np.mean(np.sort(d[i])[:k] ** 2)) for i in range(n)]
    score = []
    for i in range(n):
        denser = [j for j in range(n) if (rho[j], -j) > (rho[i], -i)]
        score.append(rho[i] * (min(d[i][j] for j in denser) if denser else d[i].max()))
    order = sorted(range(n), key=lambda i: (-score[i], i))
    peaks = sorted(order[:k])
    return order, [i if i in peaks else min(peaks, key=lambda p: (d[i][p], p)) for i in range(n)]


def test_density_peaks() -> None:
    sizes, ks = [17, 9, 3, 1], [4, 1, 3, 1]
    x = features(4, 17, seed=8)
    valid = torch.arange(17) < torch.tensor(sizes)[:, None]
    order, centre = density_peaks(x.masked_fill(~valid[..., None], 0.0), valid, torch.tensor(ks), max(ks))
    for b, (n, k) in enumerate(zip(sizes, ks, strict=True)):
        expected_order, expected_centre = slow_density_peaks(x[b, :n].double().numpy(), k)
        assert order[b, :n].argsort().tolist() == expected_order
        assert centre[b, :n].tolist() == expected_centre


def test_density_peaks_of_groups() -> None:
    """Three far groups of different density: one peak each, and no token joins another group."""
    g = torch.Generator().manual_seed(1)
    group = torch.arange(18) % 3
    x = torch.randn(1, 18, D, generator=g) * 0.1 + torch.eye(D)[group] * 5
    _, centre = density_peaks(x, torch.ones(1, 18, dtype=torch.bool), torch.tensor([3]), 3)
    assert torch.equal(group[centre[0]], group)
    assert centre.unique().numel() == 3


def test_density_peaks_where_an_exp_would_underflow() -> None:
    x, valid = features(1, 18, seed=9) * 12, torch.ones(1, 18, dtype=torch.bool)
    order, centre = density_peaks(x, valid, torch.tensor([4]), 5)
    nearest = (torch.cdist(x, x)[0] ** 2 / D).sort(-1).values[:, :4].mean(-1)
    assert (torch.exp(-nearest) == 0).any(), "control: fp32 cannot tell these densities apart"
    expected_order, expected_centre = slow_density_peaks(x[0].double().numpy(), 4)
    assert order[0].argsort().tolist() == expected_order
    assert centre[0].tolist() == expected_centre


def test_density_peaks_of_equal_tokens() -> None:
    x = torch.ones(1, 6, D)
    order, centre = density_peaks(x, torch.ones(1, 6, dtype=torch.bool), torch.tensor([2]), 6)
    assert order.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert centre.tolist() == [[0, 1, 0, 0, 0, 0]]


def test_density_peaks_of_tokens_that_repeat() -> None:
    """Far from 0, where squares lose what tells tokens apart: repetitions have distance 0 and others their own."""
    x = features(1, 12, seed=10) + 100
    x = torch.cat([x, x[:, :7], x[:, :3]], 1)
    expected_order, expected_centre = slow_density_peaks(x[0].double().numpy(), 6)
    order, centre = density_peaks(x, torch.ones(1, 22, dtype=torch.bool), torch.tensor([6]), 6)
    assert order[0].argsort().tolist() == expected_order
    assert centre[0].tolist() == expected_centre


def slow_sparsevlm(view: TokenView, b: int, ranked: int, clusters: int) -> tuple[list[int], dict[int, Tensor]]:
    """Retained tokens, and the new values of the peaks among them."""
    roles = view.prompt_role_BQ[b].tolist()
    span = [q for q, role in enumerate(roles) if role == INSTRUCTION] or [q for q, role in enumerate(roles) if role]
    raters = sorted(slow_raters(view.input_vision_BUD[b], view.input_prompt_BQD[b], span))
    score = view.attention_prompt_BHQV[b][:, raters].double().mean((0, 1))
    keep = best(score, ranked)
    rest = [v for v in sorted(range(len(score)), key=lambda v: (-float(score[v]), v)) if v not in keep]
    pool = sorted(rest[: recycled(len(rest))[0]])
    if not clusters:
        return keep, {}
    x = view.vision_BVD[b, pool].double()
    _, centre = slow_density_peaks(x.numpy(), clusters)
    means = {pool[c]: x[[i for i, other in enumerate(centre) if other == c]].mean(0) for c in set(centre)}
    return sorted([*keep, *means]), means


def test_sparsevlm() -> None:
    view = view_for({"type": "sparsevlm"}, features())
    for k in (1, 2, 7, 11, V):
        for b, row in enumerate(kept({"type": "sparsevlm"}, view, [k] * 3)):
            assert row == slow_sparsevlm(view, b, k, 0)[0]


@pytest.mark.parametrize("compat", [False, True])
def test_sparsevlm_recycles(compat: bool) -> None:
    config, n = RECYCLES | {"compat": compat}, 61
    view, pruner = view_for(config, features(V=n)), make_pruner(config)
    assert (pruner.merges, pruner.exact_count) == (True, not compat)
    for k in (1, 3, 8, 20, 40, n - 1, n):
        selection = pruner(view, torch.full((3,), k))
        gone = n - k if compat else int(dropped_for(torch.tensor([k]), torch.tensor([n]), n))
        clusters = recycled(gone)[1] if compat else k - (n - gone)
        for b in range(3):
            keep, means = slow_sparsevlm(view, b, n - gone, clusters)
            assert selection.keep_BV[b].nonzero().flatten().tolist() == keep
            assert len(keep) == (k + clusters if compat else k)
            for v in range(n):
                expected = means.get(v, view.vision_BVD[b, v].double())
                assert torch.allclose(selection.vision_BVD[b, v].double(), expected, atol=1e-6)


def test_official_counts_add_recycled_tokens_on_top() -> None:
    config, counts = RECYCLES | {"compat": True}, [66, 300, 576]
    keep_BV = make_pruner(config)(view_for(config, features(V=576)), torch.tensor(counts)).keep_BV
    assert keep_BV.sum(1).tolist() == [82, 309, 576]
    assert make_pruner({"type": "sparsevlm", "compat": True}).exact_count, "without recycling there is nothing on top"


@pytest.mark.parametrize("compat", [False, True])
def test_recycling_does_not_depend_on_the_batch(compat: bool) -> None:
    """Rows of 40, 31 and 17 tokens; there, the mask of the first sample alone was written, and noise was drawn."""
    config, sizes, counts = RECYCLES | {"compat": compat}, [40, 31, 17], [12, 9, 5]
    pruner, view = make_pruner(config), view_for(config, features(V=40))
    valid = torch.arange(40) < torch.tensor(sizes)[:, None]
    loud = torch.where(valid[..., None], view.vision_BVD, 1e3)
    together = pruner(replace(view, valid_BV=valid, vision_BVD=loud), torch.tensor(counts))
    for b, (n, k) in enumerate(zip(sizes, counts, strict=True)):
        short = view_rows(view, [b])
        names = ("vision_BVD", "attention_prompt_BHQV", "valid_BV", "row_BV", "col_BV", "tile_BV", "image_BV")
        cut = {name: getattr(short, name) for name in names}
        cut = {name: value[:, :n] if value.ndim < 4 else value[..., :n] for name, value in cut.items()}
        alone = pruner(replace(short, **cut), torch.tensor([k]))
        assert torch.equal(alone.keep_BV[0], together.keep_BV[b, :n])
        assert torch.allclose(alone.vision_BVD[0], together.vision_BVD[b, :n], atol=1e-6)


def test_a_gradient_passes_the_means_and_no_score() -> None:
    x = features(V=30).requires_grad_()
    selection = make_pruner(RECYCLES)(view_for(RECYCLES, x), torch.tensor([8, 9, 10]))
    assert not selection.scores_BV.requires_grad
    selection.vision_BVD[selection.keep_BV].sum().backward()
    assert x.grad.isfinite().all()
    assert ((x.grad.abs().sum(-1) > 0).sum(1) > torch.tensor([8, 9, 10])).all(), "recycled tokens get one, too"


def test_merge_clusters_touches_peaks_only() -> None:
    x = features(2, 31).bfloat16()
    chosen = torch.zeros(2, 31, dtype=torch.bool)
    chosen[0, [1, 4, 9]], chosen[1, 5] = True, True
    peak, value = merge_clusters(x, chosen, torch.tensor([2, 1]))
    assert peak.sum(1).tolist() == [2, 1]
    assert (peak <= chosen).all()
    assert torch.equal(value[~peak], x[~peak])
    assert value.dtype == torch.bfloat16
    assert torch.equal(value[1], x[1]), "a cluster of one is that token"


def test_sparsevlm_refuses_fewer_heads_than_none() -> None:
    with pytest.raises(ValueError, match="averages its strongest `heads`, got -1; set 1 or more, or 0 for all"):
        create({"type": "sparsevlm", "heads": -1})


# ------------------------------------------------------------------------------------------ in a model


@pytest.mark.parametrize("side", ["left", "right"])
def test_sparsevlm_in_a_model(eager_model: Any, side: str) -> None:
    """Raters from the embeddings, ratings from the layer before; words before an image never rate its tokens."""
    inputs = batch(SAMPLES, side)
    with torch.no_grad():
        out = eager_model(**inputs, output_attentions=True, output_hidden_states=True)
    attach(eager_model, PruningPlan([Stage("sparsevlm", 3, keep_tokens=9)]))
    with record(eager_model) as trace, torch.no_grad():
        eager_model(**inputs)
    selection = trace.stages[-1].selection
    pictures = rows(inputs)
    for r, (b, places) in enumerate(pictures):
        filled = {p for bb, pp in pictures if bb == b for p in pp}
        real = inputs["attention_mask"][b].nonzero().flatten().tolist()
        words = [p for p in real if p > places[-1] and p not in filled]
        raters = slow_raters(out.hidden_states[0][b, places], out.hidden_states[0][b], words)
        score = out.attentions[2][b][:, sorted(raters)][:, :, places].mean((0, 1))
        assert torch.allclose(selection.scores_BV[r], score, atol=1e-6)
        assert selection.keep_BV[r].nonzero().flatten().tolist() == best(score, 9)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("config", [{"type": "sparsevlm", "heads": 2}, RECYCLES], ids=config_id)
def test_sparsevlm_stages_equal_the_reference(model: Any, base: Any, config: dict[str, Any], positions: str) -> None:
    stages = [Stage(dict(config), layer, keep_tokens=k) for layer, k in ((1, 40), (3, 21), (5, 6))]
    check(model, base, PruningPlan(stages, positions=positions), batch([(5, 2, 7), (9, 2, 8)]))


def test_official_counts_in_a_model(model: Any, base: Any) -> None:
    """30 by rank and 2 recycled of 64; then 11 by rank and 1 recycled of these 32."""
    stages = [Stage(RECYCLES | {"compat": True}, layer, keep_tokens=k) for layer, k in ((2, 30), (4, 11))]
    plan = PruningPlan(stages, positions="compact")
    check(model, base, plan, batch([(5, 2, 7), (9, 2, 8)]))
    detach(model)
    attach(model, plan)
    with record(model) as trace, torch.no_grad():
        model(**batch(SAMPLES))
    assert [stage.vision_out for stage in trace.stages] == [[32] * 3, [12] * 3]


def test_raters_do_not_change_from_stage_to_stage(model: Any) -> None:
    plan = PruningPlan([Stage(dict(RECYCLES), layer, keep_tokens=k) for layer, k in ((2, 30), (4, 11))])
    attach(model, plan)
    with record(model) as trace, torch.no_grad():
        model(**batch(SAMPLES))
    first, second = (stage.view for stage in trace.stages)
    raters = [
        text_raters(v.input_vision_BUD, v.input_valid_BU, v.input_prompt_BQD, question(v.prompt_role_BQ))
        for v in (first, second)
    ]
    assert torch.equal(*raters)
    assert [stage.vision_out for stage in trace.stages] == [[30] * 3, [11] * 3]
