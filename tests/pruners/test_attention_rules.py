"""FastV, PyramidDrop and the raters of SparseVLM against slow versions of their formulas, alone and inside a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import check
from insertion.views.test_views import rows, view_of
from no_sync import NoSync
from support import batch, config_id, make_pruner, make_view, one_sample, pad_view, view_rows
from torch import Tensor

from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.base import BETWEEN, INSTRUCTION, SYSTEM
from tpcompress.pruners.fastv import QUERIES, fastv_score
from tpcompress.pruners.pyramiddrop import pyramid_stages
from tpcompress.pruners.sparsevlm import (
    question,
    rater_score,
    sparsevlm_stages,
    text_raters,
)
from tpcompress.pruners.topk import head_mean

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


WORDS, TOKENS = torch.ones(20, 9, dtype=torch.bool), torch.ones(20, 40, dtype=torch.bool)
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads": lambda attention: head_mean(attention[:, :, 0]),
    "fastv": fastv_score,
    "words": lambda attention: fastv_score(attention, WORDS),
    "raters": lambda attention: rater_score(attention, WORDS, TOKENS[:, : attention.shape[-1]]),
    "strong heads": lambda attention: rater_score(attention, WORDS, TOKENS[:, : attention.shape[-1]], 3),
}


@pytest.mark.parametrize("mean", MEANS)
def test_tokens_of_equal_attention_tie_however_long_their_row(mean: str) -> None:
    """In fp32 a sum over heads or words comes out otherwise for a row's last tokens, where it is not vectorised."""
    attention = torch.rand(20, 32, 9, 1, generator=torch.Generator().manual_seed(3))
    found = torch.cat([MEANS[mean](attention.expand(-1, -1, -1, n).contiguous()) for n in range(1, 41)], 1)
    assert torch.equal(found, found[:, :1].expand_as(found))


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
            views.append(plan.stages[0].pruner(view, torch.tensor([9])).scores_BV)
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
    """No word lies above the mean: the official rule then has no rater and divides by zero."""
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


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("name", "layers", "counts"),
    [("fastv", [2], [288]), ("pyramiddrop", [8, 16, 24], [288, 144, 72]), ("sparsevlm", [3, 7, 16], [82, 32, 18])],
)
def test_recipes(name: str, layers: list[int], counts: list[int]) -> None:
    plan = PruningPlan.of(RECIPES / f"{name}.yaml")
    assert {stage.pruner.name for stage in plan.stages} == {name}
    assert [stage.layer for stage in plan.stages] == layers
    assert plan.counts(576) == counts
    assert plan.positions == ("original" if name == "fastv" else "compact")
    if name == "pyramiddrop":
        assert [(stage.layer, stage.keep_ratio) for stage in plan.stages] == pyramid_stages(32)
    if name == "sparsevlm":
        assert [(stage.layer, stage.keep_tokens) for stage in plan.stages] == sparsevlm_stages(64)
