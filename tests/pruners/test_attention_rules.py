"""FastV, PyramidDrop and SparseVLM against slow versions of their formulas, alone and inside a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import check
from insertion.test_no_sync import NoSync
from insertion.test_views import rows, view_of
from support import batch, config_id, make_pruner, make_view, one_sample, pad_view, view_rows
from torch import Tensor

from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.base import BETWEEN, INSTRUCTION, SYSTEM
from tpcompress.pruners.fastv import QUERIES, fastv_score
from tpcompress.pruners.pyramiddrop import pyramid_stages
from tpcompress.pruners.sparsevlm import (
    RANKED,
    density_peaks,
    dropped_for,
    merge_clusters,
    question,
    rater_score,
    recycled,
    sparsevlm_stages,
    text_raters,
)

RECIPES = Path(__file__).parents[2] / "recipes" / "free"
SAMPLES = [(5, 1, 7), (3, 2, 8), (4, 0, 9)]
V, D = 23, 16

RECYCLES: dict[str, Any] = {"type": "sparsevlm", "recycle": True}
EVERY: list[dict[str, Any]] = [
    {"type": "fastv"},
    {"type": "fastv", "query_source": "all_prompt"},
    {"type": "fastv", "query_source": "last_vision"},
    {"type": "pyramiddrop"},
    {"type": "sparsevlm"},
    {"type": "sparsevlm", "heads": 2},
    RECYCLES,
]

every = pytest.mark.parametrize("config", EVERY, ids=config_id)


def features(B: int = 3, V: int = V, seed: int = 4) -> Tensor:
    return torch.randn(B, V, D, generator=torch.Generator().manual_seed(seed))


def view_for(config: dict[str, Any], x_BVD: Tensor) -> TokenView:
    return make_view(make_pruner(config), x_BVD)


def kept(config: dict[str, Any], view: TokenView, counts: list[int]) -> list[list[int]]:
    keep_BV = make_pruner(config)(view, torch.tensor(counts)).keep_BV
    return [row.nonzero().flatten().tolist() for row in keep_BV]


def best(scores: Any, k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda v: (-float(scores[v]), v))[:k])


# ------------------------------------------------------------------------------------------------------- all of them


@every
def test_no_choice_makes_the_host_wait(config: dict[str, Any]) -> None:
    pruner, view, counts = make_pruner(config), view_for(config, features()), torch.tensor([4, 9, V])
    with NoSync():
        pruner(view, counts)


@every
def test_asked_for_more_than_there_is(config: dict[str, Any]) -> None:
    view = pad_view(view_for(config, features()), 4, (1, V + 4))
    keep_BV = make_pruner(config)(view, torch.tensor([V + 1, V + 4, 3])).keep_BV
    assert keep_BV.sum(1).tolist() == [V, V, 3]
    assert not keep_BV[:, V:].any()


@pytest.mark.parametrize("config", EVERY + [RECYCLES | {"compat": True}], ids=config_id)
def test_equal_attention_goes_to_the_first(config: dict[str, Any]) -> None:
    view = view_for(config, features())
    same = {n: torch.full_like(v, 1 / V) for n, v in vars(view).items() if n.startswith("attention") and v is not None}
    assert same, "control: every rule here reads attention"
    for row in kept(config, replace(view, **same), [1, 2, 3]):
        assert row[0] == 0
        assert row[: len(row) - 1] == list(range(len(row) - 1))


# --------------------------------------------------------------------------------------------------- FastV


@pytest.mark.parametrize("source", QUERIES)
def test_fastv(source: str) -> None:
    config = {"type": "fastv", "query_source": source}
    view = view_for(config, features())
    for b in range(3):
        if source == "all_prompt":
            words = [q for q, role in enumerate(view.prompt_role_BQ[b].tolist()) if role]
            rows = [view.attention_prompt_BHQV[b, :, q] for q in words]
        else:
            rows = [(view.attention_BHV if source == "last_prompt" else view.attention_last_vision_BHV)[b]]
        score = sum(row[h].double().numpy() for row in rows for h in range(4)) / (4 * len(rows))
        for k in (1, 5, 11, V):
            assert kept(config, view_rows(view, [b]), [k])[0] == best(score, k)


def test_fastv_of_prompts_of_different_lengths() -> None:
    attention = torch.rand(2, 4, 6, V)
    query = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    score = fastv_score(attention, query)
    assert torch.allclose(score[0], attention[0].mean((0, 1)))
    assert torch.allclose(score[1], attention[1, :, :2].mean((0, 1)))
    assert torch.equal(fastv_score(attention, torch.zeros_like(query)), torch.zeros(2, V))
    assert torch.allclose(fastv_score(attention), attention.mean((1, 2)))


def test_fastv_needs_its_source_alone() -> None:
    for source, view in QUERIES.items():
        pruner = create({"type": "fastv", "query_source": source})
        assert pruner.needs == {view}
        assert pruner.prompt_dependent == (source != "last_vision")
    assert create("fastv").config() == {"type": "fastv", "query_source": "last_prompt"}
    with pytest.raises(ValueError, match="no query source 'cls'; choose one of last_prompt, all_prompt, last_vision"):
        create({"type": "fastv", "query_source": "cls"})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("source", QUERIES)
def test_fastv_in_a_model(eager_model: Any, source: str, side: str) -> None:
    """Every image of every sample, not the first one: by the model's own attention."""
    inputs = batch(SAMPLES, side)
    with torch.no_grad():
        full = eager_model(**inputs, output_attentions=True).attentions[1]
    pruner = {"type": "fastv", "query_source": source}
    attach(eager_model, PruningPlan([Stage(pruner, 2, keep_tokens=9)]))
    with record(eager_model) as trace, torch.no_grad():
        eager_model(**inputs)
    stage = trace.stages[-1]
    assert len(rows(inputs)) == 3
    for r, (b, places) in enumerate(rows(inputs)):
        real = inputs["attention_mask"][b].nonzero().flatten().tolist()
        others = [p for bb, pp in rows(inputs) if bb == b for p in pp]
        queries = {"last_prompt": real[-1:], "last_vision": places[-1:]}.get(
            source, [p for p in real if p not in others]
        )
        score = full[b][:, queries][:, :, places].mean((0, 1))
        assert torch.allclose(stage.selection.scores_BV[r], score, atol=1e-6)
        assert stage.selection.keep_BV[r].nonzero().flatten().tolist() == best(score, 9)


def test_the_last_vision_token_reads_no_question(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    other = {k: v.clone() for k, v in inputs.items()}
    other["input_ids"][:, -6:] = other["input_ids"][:, -6:] % 80 + 7
    chosen = {}
    for source in QUERIES:
        views = []
        for question_inputs in (inputs, other):
            plan = PruningPlan([Stage({"type": "fastv", "query_source": source}, 2, keep_tokens=9)])
            view = view_of(model, plan, question_inputs)
            views.append(plan.stages[0].rule(view, torch.tensor([9])).scores_BV)
            detach(model)
        chosen[source] = torch.equal(*views)
    assert chosen == {"last_prompt": False, "all_prompt": False, "last_vision": True}


# ------------------------------------------------------------------------------------------------------- PyramidDrop


@pytest.mark.parametrize("side", ["left", "right"])
def test_pyramiddrop_in_a_model(eager_model: Any, side: str) -> None:
    """The layer behind the stage, with grouped keys: 4 query heads share 2."""
    inputs = batch(SAMPLES, side)
    with torch.no_grad():
        full = eager_model(**inputs, output_attentions=True).attentions
    assert eager_model.config.get_text_config().num_key_value_heads == 2
    for layer in (1, 3, 5):
        attach(eager_model, PruningPlan([Stage("pyramiddrop", layer, keep_tokens=9)]))
        with record(eager_model) as trace, torch.no_grad():
            eager_model(**inputs)
        detach(eager_model)
        selection = trace.stages[-1].selection
        for r, (b, places) in enumerate(rows(inputs)):
            last = int(inputs["attention_mask"][b].nonzero()[-1])
            score = full[layer][b][:, last, places].mean(0)
            assert torch.allclose(selection.scores_BV[r], score, atol=1e-6)
            assert selection.keep_BV[r].nonzero().flatten().tolist() == best(score, 9)


def test_a_pyramid_keeps_shares_of_the_original_count(model: Any, base: Any) -> None:
    stages = [Stage("pyramiddrop", layer, keep_ratio=ratio) for layer, ratio in pyramid_stages(6, parts=3)]
    plan = PruningPlan(stages, positions="compact")
    check(model, base, plan, batch([(5, 2, 7), (9, 2, 8)]))
    detach(model)
    inputs, found = batch(SAMPLES[:2]), []
    for one in (inputs, one_sample(inputs, 0), one_sample(inputs, 1)):
        attach(model, plan)
        with record(model) as trace, torch.no_grad():
            model(**one)
        assert [stage.vision_out for stage in trace.stages] == [[n] * len(trace.stages[0].owner) for n in (32, 16)]
        found.append(trace.stages[-1].retained_RV)
        detach(model)
    alone = [row for retained in found[1:] for row in retained.tolist()]
    assert found[0].tolist() == alone, "a row's choice depends on its batch"


def test_pyramid_stages() -> None:
    assert pyramid_stages(32) == [(8, 0.5), (16, 0.25), (24, 0.125)]
    assert [layer for layer, _ in pyramid_stages(28)] == [7, 14, 21]
    assert pyramid_stages(2, parts=2, ratio=1.0) == [(1, 1.0)]
    for wrong in ({"num_layers": 3}, {"num_layers": 32, "parts": 1}, {"num_layers": 32, "ratio": 0.0}):
        with pytest.raises(ValueError, match="A pyramid"):
            pyramid_stages(**wrong)


# -------------------------------------------------------------------------------------------- SparseVLM: raters


def slow_raters(vision: Tensor, word: Tensor, span: list[int]) -> set[int]:
    """p_t = mean_i softmax_t(v_i . e_t); raters lie above the mean."""
    p = np.zeros(len(span))
    for v in vision.double().numpy():
        logits = np.array([float(v @ word[t].double().numpy()) for t in span])
        p += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() / len(vision)
    return {t for t, value in zip(span, p, strict=True) if value > p.mean()} or set(span)


def test_raters() -> None:
    g = torch.Generator().manual_seed(5)
    vision, word = torch.randn(4, 12, D, generator=g), torch.randn(4, 9, D, generator=g)
    valid = torch.arange(12) < torch.tensor([12, 7, 1, 12])[:, None]
    span = torch.tensor([[True] * 9, [False] * 4 + [True] * 5, [True] * 6 + [False] * 3, [False] * 8 + [True]])
    vision[~valid], word[~span] = 1e3, 1e3
    rater = text_raters(vision, valid, word, span)
    for b in range(4):
        expected = slow_raters(vision[b, valid[b]], word[b], span[b].nonzero().flatten().tolist())
        assert set(rater[b].nonzero().flatten().tolist()) == expected
    assert 0 < rater[0].sum() < 9, "control: some words rate, some do not"


@pytest.mark.parametrize("Q", [1, 2, 3, 7, 10])
def test_equally_close_words_all_rate(Q: int) -> None:
    """Nobody lies above the mean: the official rule has no rater then, and divides by none."""
    vision, valid = features(2, 5), torch.ones(2, 5, dtype=torch.bool)
    word = features(2, 1, seed=6).expand(2, Q, D)
    assert text_raters(vision, valid, word, torch.ones(2, Q, dtype=torch.bool)).all()


def test_a_prompt_without_words_rates_nothing_and_stays_finite() -> None:
    config = {"type": "sparsevlm"}
    view = view_for(config, features())
    view = replace(view, prompt_role_BQ=torch.zeros_like(view.prompt_role_BQ))
    selection = make_pruner(config)(view, torch.tensor([3, 4, 5]))
    assert (selection.scores_BV == 0).all()
    assert selection.keep_BV.sum(1).tolist() == [3, 4, 5]


def test_question_is_what_follows_the_image() -> None:
    roles = torch.tensor([[SYSTEM, INSTRUCTION, INSTRUCTION, 0], [SYSTEM, BETWEEN, SYSTEM, 0], [0, 0, 0, 0]])
    assert question(roles).long().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("heads", [0, 1, 2, 3, 4, 14])
def test_rater_score(heads: int) -> None:
    attention, valid = torch.rand(3, 4, 6, V), torch.arange(V) < torch.tensor([V, 9, 1])[:, None]
    attention = torch.where(valid[:, None, None], attention, 50 * torch.rand(3, 4, 1, 1))  # other heads look strong
    rater = torch.rand(3, 6) < 0.5
    rater[:, 2] = True
    score = rater_score(attention, rater, valid, heads)
    for b in range(3):
        per_head = attention[b][:, rater[b]].double().mean(1)[:, valid[b]]
        strong = sorted(range(4), key=lambda h: -float(per_head[h].sum()))[: heads or 4]
        assert torch.allclose(score[b, valid[b]].double(), per_head[strong].mean(0))


# -------------------------------------------------------------------------------------- SparseVLM: counts, clusters


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
    """Three far groups of different density: one peak each, and nobody joins a stranger."""
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
    assert (pruner.merges, pruner.exact) == (True, not compat)
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
    assert make_pruner({"type": "sparsevlm", "compat": True}).exact, "without recycling there is nothing on top"


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


# ------------------------------------------------------------------------------------------ SparseVLM in a model


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


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("name", "layers", "counts"),
    [("fastv", [2], [288]), ("pyramiddrop", [8, 16, 24], [288, 144, 72]), ("sparsevlm", [3, 7, 16], [82, 32, 18])],
)
def test_recipes(name: str, layers: list[int], counts: list[int]) -> None:
    plan = PruningPlan.from_file(RECIPES / f"{name}.yaml")
    assert {stage.rule.name for stage in plan.stages} == {name}
    assert [stage.layer for stage in plan.stages] == layers
    assert plan.counts(576) == counts
    assert plan.positions == ("original" if name == "fastv" else "compact")
    if name == "pyramiddrop":
        assert [(stage.layer, stage.keep_ratio) for stage in plan.stages] == pyramid_stages(32)
    if name == "sparsevlm":
        assert [(stage.layer, stage.keep_tokens) for stage in plan.stages] == sparsevlm_stages(64)
