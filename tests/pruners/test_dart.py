"""DART against slow versions written from the paper and from what is known of the official code."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import check
from support import batch, make_pruner, make_view
from torch import Tensor

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.base import INSTRUCTION, SYSTEM
from tpcompress.pruners.compat.dart import set_order

V, D = 37, 16

VARIANTS: list[dict[str, Any]] = [
    {},
    {"largest": False},
    {"norm_power": 2},
    {"space": "hidden"},
    {"pivot": "value_norm"},
    {"pivot": "value_norm", "largest": False},
    {"pivot": "attention"},
    {"pivot": "attention", "largest": False, "text_pivots": 2},
    {"pivot": "hidden_norm"},
    {"pivot": "hidden_norm", "space": "normed", "words": "prompt"},
    {"pivot": "random", "seed": 5},
    {"vision_pivots": 1, "text_pivots": 9},
]


def features(B: int = 3, tokens: int = V) -> Tensor:
    return torch.randn(B, tokens, D, generator=torch.Generator().manual_seed(4))


def view_of(config: dict[str, Any], x: Tensor) -> TokenView:
    """Everything that a variant reads; the last norm bends the states, so that its place matters."""
    view = make_view(make_pruner({"type": "dart", **config}), x)
    if view.normed_BVD is not None:
        scale = torch.linspace(0.1, 3.0, x.shape[-1])
        view = replace(view, normed_BVD=view.normed_BVD * scale, text_normed_BSD=view.text_normed_BSD * scale)
    if view.attention_prompt_BHQV is not None:
        # Words pay the image unlike shares of their attention; equal ones would be told apart by rounding.
        words = view.attention_prompt_BHQV.shape[2]
        share_Q = (torch.arange(words) * 4 % words + 1) / words
        view = replace(view, attention_prompt_BHQV=view.attention_prompt_BHQV * share_Q[:, None])
    return view


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def ranked(values: dict[int, float], largest: bool = True) -> list[int]:
    return sorted(values, key=lambda i: (-values[i] if largest else values[i], i))


def from_the_paper(view: TokenView, b: int, k: int, pruner: Any) -> set[int]:
    """One sample: pivots by their criterion; each takes its share of the free tokens least similar to it."""
    power = pruner.norm_power or (2 if pruner.pivot == "hidden_norm" else 1)
    vision = {"key_norm": view.keys_BVD, "value_norm": view.values_BVD, "hidden_norm": view.vision_BVD}
    text = {"key_norm": view.text_keys_BSD, "value_norm": view.text_values_BSD, "hidden_norm": view.text_BSD}
    words = [s for s, real in enumerate(view.text_valid_BS[b].tolist()) if real]
    if pruner.words == "prompt":
        words = [s for s, role in enumerate(view.text_role_BS[b].tolist()) if role > 0]
    if pruner.pivot == "attention":
        criterion = {v: float(view.attention_BHV[b, :, v].mean()) for v in range(V)}
        columns = view.prompt_column_BQ[b].tolist()
        word_criterion = {s: float(view.attention_prompt_BHQV[b, :, columns.index(s)].mean(0).sum()) for s in words}
    else:
        criterion = {v: float(vision[pruner.pivot][b, v].norm(power)) for v in range(V)}
        word_criterion = {s: float(text[pruner.pivot][b, s].norm(power)) for s in words}
    normed = pruner.space == "normed" or (not pruner.space and pruner.pivot != "hidden_norm")
    h, h_text = (view.normed_BVD, view.text_normed_BSD) if normed else (view.vision_BVD, view.text_BSD)
    kept = ranked(criterion, pruner.largest)[: pruner.vision_pivots][:k]
    pivots = [h[b, v] for v in kept]
    pivots += [h_text[b, s] for s in ranked(word_criterion, pruner.largest)[: pruner.text_pivots]]
    left = k - len(kept)
    for p, pivot in enumerate(pivots):
        share = left // len(pivots) + (p < left % len(pivots))
        free = {v: cosine(pivot, h[b, v]) for v in range(V) if v not in kept}
        kept += ranked(free, largest=False)[:share]
    return set(kept)


def kept_of(keep_V: Tensor) -> set[int]:
    return set(keep_V.nonzero().flatten().tolist())


@pytest.mark.parametrize("config", [c for c in VARIANTS if c.get("pivot") != "random"], ids=str)
def test_every_criterion_and_space(config: dict[str, Any]) -> None:
    pruner, view = make_pruner({"type": "dart", **config}), view_of(config, features())
    for k in (1, 3, 4, 5, 11, 20, V):
        selection = pruner(view, torch.full((3,), k))
        for b in range(3):
            assert kept_of(selection.keep_BV[b]) == from_the_paper(view, b, k, pruner)


def test_criteria_and_spaces_choose_differently() -> None:
    chosen = {}
    for config in VARIANTS:
        keep = make_pruner({"type": "dart", **config})(view_of(config, features()), torch.full((3,), 12)).keep_BV
        chosen[str(config)] = tuple(keep.flatten().tolist())
    assert len(set(chosen.values())) == len(VARIANTS)


def test_random_pivots_are_a_share_of_all_and_follow_their_seed() -> None:
    def pivots(seed: int) -> set[int]:
        pruner = make_pruner({"type": "dart", "pivot": "random", "seed": seed})
        return kept_of(pruner(view_of({"pivot": "random"}, features(1)), torch.tensor([4])).keep_BV[0])

    assert pivots(1) == pivots(1)
    assert len({frozenset(pivots(seed)) for seed in range(20)}) > 15
    assert set().union(*(pivots(seed) for seed in range(200))) == set(range(V)), "every token is a pivot of some seed"


@pytest.mark.parametrize("config", [*VARIANTS, {"compat": "llava"}, {"compat": "qwen", "reduction": 0.5}], ids=str)
def test_columns_of_the_batch_do_not_matter(config: dict[str, Any]) -> None:
    """A longer partner moves a sample's words to the right."""
    pruner, view, extra = make_pruner({"type": "dart", **config}), view_of(config, features()), 4
    moved = {}
    for name in ("text_BSD", "text_normed_BSD", "text_keys_BSD", "text_values_BSD", "text_role_BS", "text_valid_BS"):
        value = getattr(view, name)
        if value is not None:
            more = value.new_full((3, extra, *value.shape[2:]), 50 if value.is_floating_point() else 0)
            moved[name] = torch.cat([more, value], 1)
    if view.prompt_column_BQ is not None:
        moved["prompt_column_BQ"] = view.prompt_column_BQ + extra
    counts = torch.tensor([5, 12, 30])
    assert torch.equal(pruner(view, counts).keep_BV, pruner(replace(view, **moved), counts).keep_BV)


def test_scores_put_pivots_first() -> None:
    pruner, view = make_pruner({"type": "dart"}), view_of({}, features())
    selection = pruner(view, torch.tensor([12, 12, 12]))
    first = pruner(view, torch.tensor([4, 4, 4])).keep_BV
    assert (selection.scores_BV[first] == 1).all()
    assert selection.scores_BV[~first].max() < 1


def test_runtime_before_the_language_model() -> None:
    """The embedding-level variant of TensorRT-Edge-LLM: pivot p of P takes ceil(left / (P - p)) of the free tokens."""
    config = {"pivot": "hidden_norm", "norm_power": 1, "words": "prompt"}
    pruner, view = make_pruner({"type": "dart", **config}), view_of(config, features())
    assert pruner.needs == {"text"}
    for k in (1, 4, 9, 17, 30):
        keep = pruner(view, torch.full((3,), k)).keep_BV
        for b in range(3):
            role = view.text_role_BS[b].tolist()
            words = {s: float(view.text_BSD[b, s].abs().sum()) for s in range(len(role)) if role[s] > 0}
            kept = ranked({v: float(view.vision_BVD[b, v].abs().sum()) for v in range(V)})[: min(4, k)]
            pivots = [view.vision_BVD[b, v] for v in kept]
            pivots += [view.text_BSD[b, s] for s in ranked(words)[:4]]
            for p, pivot in enumerate(pivots):
                share = math.ceil((k - len(kept)) / (len(pivots) - p))
                free = {v: cosine(pivot, view.vision_BVD[b, v]) for v in range(V) if v not in kept}
                kept += ranked(free, largest=False)[:share]
            assert kept_of(keep[b]) == set(kept)


# ------------------------------------------------------------------------------------------------- the official code


@pytest.mark.parametrize("P", [1, 2, 4, 5, 8, 9, 18, 19, 25])
@pytest.mark.parametrize("limit", [40, 700, 3000, 2**40])
def test_set_order_is_that_of_python(P: int, limit: int) -> None:
    rng = random.Random(P)
    rows = [rng.sample(range(limit), P) for _ in range(60)]
    order = set_order(torch.tensor(rows))
    for row, indices in zip(rows, order.tolist(), strict=True):
        assert [row[i] for i in indices] == list(set(row))
        if P == 8:
            assert list(set(row).copy()) == list(set(row)), "the official code walks through a copy"


def official(view: TokenView, b: int, m: int) -> set[int]:
    """One sample, batch 1, no padding: positions of words before the image, the image, words behind it."""
    roles = view.text_role_BS[b].tolist()
    start = roles.count(SYSTEM)
    tokens = view.vision_BVD.shape[1]
    behind = [s for s, role in enumerate(roles) if role == INSTRUCTION]
    state = {start + v: view.normed_BVD[b, v] for v in range(tokens)}
    state |= {start + tokens + n: view.text_normed_BSD[b, s] for n, s in enumerate(behind)}
    norm = {start + v: float(view.keys_BVD[b, v].abs().sum()) for v in range(tokens)}
    words = {start + tokens + n: float(view.text_keys_BSD[b, s].abs().sum()) for n, s in enumerate(behind)}
    image_pivots, word_pivots = ranked(norm)[:4], ranked(words)[:4]
    kept = set(image_pivots)
    for pivot in set(image_pivots + word_pivots):
        free = {i: cosine(state[pivot], state[i]) for i in norm if i not in kept}
        kept |= set(ranked(free, largest=False)[:m])
    return {i - start for i in kept}


@pytest.mark.parametrize(("tokens", "budget"), [(37, 12), (64, 20), (144, 64)])
def test_compat_retains_what_the_official_code_retains(tokens: int, budget: int) -> None:
    x = features(6, tokens)
    pruner, ours = make_pruner({"type": "dart", "compat": "llava"}), make_pruner({"type": "dart"})
    assert not pruner.exact_count
    assert ours.exact_count
    view, m = view_of({"compat": "llava"}, x), budget // 8
    keep = pruner(view, torch.full((6,), budget)).keep_BV
    plain = ours(view, torch.full((6,), 4 + 8 * m)).keep_BV
    expected = [official(view, b, m) for b in range(6)]
    assert [kept_of(row) for row in keep] == expected
    assert [kept_of(row) for row in plain] != expected, "control: the order of the visits changes the choice"
    # The same count from the other side: m = int(V (1 - reduction) / 8).
    qwen = make_pruner({"type": "dart", "compat": "qwen", "reduction": 1 - (8 * m + 0.5) / tokens})
    assert torch.equal(qwen(view, torch.ones(6, dtype=torch.long)).keep_BV, keep)


@pytest.mark.parametrize(
    ("config", "tokens", "budget", "expected"),
    [
        ({"compat": "llava"}, 576, 192, 196),
        ({"compat": "llava"}, 576, 128, 132),
        ({"compat": "llava"}, 576, 64, 68),
        ({"compat": "llava"}, 2880, 320, 324),
        ({"compat": "llava"}, 300, 320, 4 + 296 // 8 * 8),
        ({"compat": "llava"}, 576, 576, 572),
        ({"compat": "llava"}, 3, 2, 3),
        ({"compat": "qwen", "reduction": 0.667}, 576, 1, 188),
        ({"compat": "qwen", "reduction": 0.778}, 576, 1, 124),
        ({"compat": "qwen", "reduction": 0.889}, 576, 1, 60),
        ({"compat": "qwen", "reduction": 0.889}, 300, 1, 36),
        ({"compat": "qwen", "reduction": 0.889}, 60, 1, 4),
        ({"compat": "qwen", "reduction": 0.001}, 9, 1, 9),
    ],
)
def test_official_counts(config: dict[str, Any], tokens: int, budget: int, expected: int) -> None:
    pruner, view = make_pruner({"type": "dart", **config}), view_of(config, features(1, tokens))
    assert int(pruner(view, torch.tensor([budget])).keep_BV.sum()) == expected


@pytest.mark.parametrize("words", [0, 1, 3])
def test_compat_with_few_words_keeps_the_count(words: int) -> None:
    """The official code stops with an error there."""
    view = view_of({"compat": "llava"}, features())
    role = view.text_role_BS.clone()
    role[:, 5 + words :] = 0
    keep = make_pruner({"type": "dart", "compat": "llava"})(replace(view, text_role_BS=role), torch.full((3,), 20))
    assert keep.keep_BV.sum(1).tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"space": "cosine"}, "dart has no space 'cosine'; choose one of '', 'normed', 'hidden'"),
        ({"words": "all"}, "dart has no words 'all'"),
        ({"norm_power": 3}, "dart has no norm_power 3; choose one of 0, 1, 2"),
        ({"compat": "phi"}, "dart has no compat 'phi'"),
        ({"compat": "qwen"}, "reduction, in .0, 1., with compat 'qwen' and only there"),
        ({"reduction": 0.5}, "reduction, in .0, 1., with compat 'qwen' and only there"),
    ],
)
def test_refused_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        create({"type": "dart", **config})
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- inside a model


@pytest.mark.parametrize("config", [{}, {"pivot": "value_norm"}, {"pivot": "attention"}, {"pivot": "random"}], ids=str)
def test_inside_a_model(model: Any, base: Any, config: dict[str, Any]) -> None:
    plan = PruningPlan([Stage({"type": "dart", **config}, 2, keep_tokens=13)])
    assert PruningPlan.from_yaml(plan.to_yaml()).to_dict() == plan.to_dict()
    check(model, base, plan, batch([(5, 1, 7), (3, 2, 8)]))


def test_before_the_language_model(model: Any, base: Any) -> None:
    config = {"type": "dart", "pivot": "hidden_norm", "norm_power": 1, "words": "prompt"}
    check(model, base, PruningPlan([Stage(config, 0, keep_ratio=0.75)]), batch([(5, 1, 7), (3, 2, 8)]))
    with pytest.raises(ValueError, match="Pruner 'dart' needs keys of the layer before, which does not exist"):
        attach(base, PruningPlan([Stage("dart", 0, keep_ratio=0.75)]))


def test_the_model_shows_what_the_formula_reads(model: Any) -> None:
    """Keys, normed states and words of a real prefill give the tokens that the slow version takes."""
    pruner = create({"type": "dart"})
    attach(model, PruningPlan([Stage(pruner, 2, keep_tokens=V)]))
    with record(model) as trace, torch.no_grad():
        model(**batch([(5, 1, 7)]))
    view = trace.stages[0].view
    view = TokenView(
        **{k: v[:, :V] if isinstance(v, Tensor) and k.endswith(("BV", "BVD")) else v for k, v in vars(view).items()}
    )
    keep = pruner(view, torch.tensor([11])).keep_BV
    assert kept_of(keep[0]) == from_the_paper(view, 0, 11, pruner)


def test_official_counts_inside_a_model(model: Any, base: Any) -> None:
    plan = PruningPlan([Stage({"type": "dart", "compat": "llava"}, 2, keep_tokens=30)])
    check(model, base, plan, batch([(5, 1, 7), (3, 2, 8)]))
    with record(model) as trace, torch.no_grad():
        model(**batch([(5, 1, 7), (3, 2, 8)]))
    assert trace.stages[0].retained_RV.sum(1).tolist() == [28, 28, 28]
