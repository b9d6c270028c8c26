"""What every registered pruner promises, with its defaults and its variants."""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from no_sync import NoSync
from support import (
    INEXACT,
    VARIANTS,
    config_id,
    inexact_configs,
    make_pruner,
    make_view,
    pad_view,
    pruner_configs,
    view_rows,
)
from torch import Tensor

from tpcompress.pruners import Selection, TokenView, create, list_pruners

GRIDS = {1: (1, 1), 2: (1, 2), 3: (3, 1), 7: (1, 7), 12: (3, 4), 35: (5, 7), 64: (8, 8)}
D = 16

every_pruner = pytest.mark.parametrize("config", pruner_configs(), ids=config_id)
every_counter = pytest.mark.parametrize("config", inexact_configs(), ids=config_id)
every_rule = pytest.mark.parametrize("config", pruner_configs() + inexact_configs(), ids=config_id)


def features(B: int, V: int, seed: int = 0) -> Tensor:
    """(B, V, D), row by row the same whatever B is."""
    rows = [torch.randn(V, D, generator=torch.Generator().manual_seed(seed + 100 * b)) for b in range(B)]
    return torch.stack(rows)


def run(config: dict[str, Any], x_BVD: Tensor, counts: list[int], soft: bool = False) -> Selection:
    pruner = make_pruner(config).train(soft)
    with torch.no_grad():
        return pruner(make_view(pruner, x_BVD, GRIDS[x_BVD.shape[1]], soft=soft), torch.tensor(counts))


def test_variants_name_registered_pruners() -> None:
    assert set(VARIANTS) | set(INEXACT) <= set(list_pruners())
    assert len(pruner_configs()) >= len([cls for cls in list_pruners().values() if not cls.keeps_none]) > 20


@every_rule
def test_says_truly_what_it_does(config: dict[str, Any]) -> None:
    """`exact`, `merges`, `differentiable` and `paper` are what the table of pruners prints."""
    pruner = make_pruner(config).train()
    assert pruner.exact_count == (config not in inexact_configs())
    assert pruner.paper == "ours" or re.fullmatch(r"\d{4}\.\d{5}( .*)?", pruner.paper)
    x = features(2, 12).requires_grad_()
    selection = pruner(make_view(pruner, x, GRIDS[12], soft=True), torch.tensor([4, 7]))
    assert selection.scores_BV.requires_grad == pruner.differentiable
    assert pruner.learned <= pruner.differentiable, "whose weights could learn nothing"
    hard = pruner.eval()(make_view(pruner, x, GRIDS[12]), torch.tensor([4, 7]))
    assert (hard.vision_BVD is not None) == pruner.merges


@every_rule
def test_scores_are_fp32_whatever_the_dtype(config: dict[str, Any]) -> None:
    pruner = make_pruner(config)
    view = make_view(pruner, features(2, 12).bfloat16(), GRIDS[12])
    with torch.no_grad():
        selection = pruner(view, torch.tensor([4, 7]))
    assert selection.scores_BV.dtype == torch.float32
    assert selection.keep_BV.dtype == torch.bool


@every_rule
def test_asked_for_more_than_there_is_keeps_what_there_is(config: dict[str, Any]) -> None:
    """As combinators do who want a full ranking: they do not know how many tokens of a row are real."""
    pruner = make_pruner(config)
    view = pad_view(make_view(pruner, features(2, 7), GRIDS[7]), 5, (2, 7))
    with torch.no_grad():
        for asked in (12, 20):
            selection = pruner(view, torch.tensor([asked, asked]))
            assert not selection.keep_BV[:, 7:].any()
            if pruner.exact_count:
                assert selection.keep_BV[:, :7].all()


@every_rule
def test_several_images_and_tiles_in_a_row(config: dict[str, Any]) -> None:
    """Two images of two tiles each on one canvas, as under `scope: prompt`."""
    pruner, counts = make_pruner(config), list(range(1, 25))
    view = make_view(pruner, features(24, 24), (8, 3))
    tile = (torch.arange(24) // 6).expand(24, -1)
    view = replace(view, tile_BV=tile, image_BV=tile // 2)
    with torch.no_grad():
        selection = pruner(view, torch.tensor(counts))
    if pruner.exact_count:
        assert selection.keep_BV.sum(1).tolist() == counts
    assert selection.scores_BV.isfinite().all()


@every_rule
def test_no_choice_makes_the_host_wait(config: dict[str, Any]) -> None:
    pruner = make_pruner(config)
    view = make_view(pruner, features(3, 35), GRIDS[35])
    with NoSync(), torch.no_grad():
        pruner(view, torch.tensor([4, 9, 35]))


@every_counter
def test_counting_for_itself_depends_on_no_partner(config: dict[str, Any]) -> None:
    pruner, counts = make_pruner(config), torch.tensor([1, 4, 9, 12])
    view = make_view(pruner, features(4, 12), GRIDS[12])
    with torch.no_grad():
        together = pruner(view, counts)
        padded = pruner(pad_view(view, 5, (5, 5)), counts)
        for b in range(4):
            alone = pruner(view_rows(view, [b]), counts[b : b + 1])
            assert torch.equal(alone.keep_BV[0], together.keep_BV[b])
    assert torch.equal(padded.keep_BV[:, :12], together.keep_BV)
    assert not padded.keep_BV[:, 12:].any()


@every_counter
def test_counting_for_itself_on_awkward_inputs(config: dict[str, Any]) -> None:
    for kind in AWKWARD:
        pruner = make_pruner(config)
        selection = pruner(make_view(pruner, awkward(kind), GRIDS[12]), torch.arange(1, 13))
        assert selection.keep_BV.shape == (12, 12), kind
        assert selection.scores_BV.isfinite().all(), kind
        if selection.vision_BVD is not None:
            assert selection.vision_BVD.isfinite().all(), kind


@every_pruner
def test_every_budget_is_exact(config: dict[str, Any]) -> None:
    for V in GRIDS:
        counts = list(range(1, V + 1))
        selection = run(config, features(V, V), counts)
        assert selection.keep_BV.dtype == torch.bool
        assert selection.keep_BV.shape == (V, V), f"of {V} tokens"
        assert selection.scores_BV.shape == (V, V), f"of {V} tokens"
        assert selection.keep_BV.sum(1).tolist() == counts, f"of {V} tokens"


@every_pruner
def test_rows_are_independent_of_the_batch(config: dict[str, Any]) -> None:
    for V in (7, 12):
        counts = list(range(1, V + 1))
        pruner, x = make_pruner(config), features(V, V)
        view = make_view(pruner, x, GRIDS[V])
        with torch.no_grad():
            together = pruner(view, torch.tensor(counts))
            for b, count in enumerate(counts):
                alone = pruner(view_rows(view, [b]), torch.tensor([count]))
                assert torch.equal(alone.keep_BV[0], together.keep_BV[b])
                if pruner.merges:
                    kept = alone.keep_BV[0]
                    assert torch.allclose(alone.vision_BVD[0, kept], together.vision_BVD[b, kept], atol=1e-6)


@every_pruner
def test_padding_changes_nothing_and_is_never_kept(config: dict[str, Any]) -> None:
    counts, (rows, cols) = [1, 4, 11, 12], GRIDS[12]
    for soft in (False, True):
        pruner, x = make_pruner(config).train(soft), features(4, 12)
        if soft and getattr(pruner, "resample", False):
            continue  # draws per token of the batch
        view = make_view(pruner, x, (rows, cols), soft=soft)
        with torch.no_grad():
            plain = pruner(view, torch.tensor(counts))
            padded = pruner(pad_view(view, 5, (rows + 2, cols + 1)), torch.tensor(counts))
        assert torch.equal(padded.keep_BV[:, :12], plain.keep_BV)
        assert not padded.keep_BV[:, 12:].any()
        assert padded.keep_BV.sum(1).tolist() == counts
        if plain.gate_BV is not None:
            assert padded.gate_BV is not None
            assert torch.allclose(padded.gate_BV[:, :12], plain.gate_BV, atol=1e-5)
            assert (padded.gate_BV[:, 12:] == 0).all()


@every_rule
def test_same_call_same_answer(config: dict[str, Any]) -> None:
    first, second = (run(config, features(2, 64), [5, 9]) for _ in range(2))
    assert torch.equal(first.keep_BV, second.keep_BV)
    assert torch.equal(first.scores_BV, second.scores_BV)
    torch.manual_seed(5)
    trained = run(config, features(2, 64), [5, 9], soft=True)
    torch.manual_seed(5)
    again = run(config, features(2, 64), [5, 9], soft=True)
    assert torch.equal(trained.keep_BV, again.keep_BV)
    if trained.vision_BVD is not None:
        assert torch.equal(trained.vision_BVD, again.vision_BVD)


@every_pruner
def test_ties_go_to_the_earlier_token(config: dict[str, Any]) -> None:
    pruner = make_pruner(config)
    x = torch.zeros(12, 12, D)
    x[..., 0] = 1.0  # one-hot, so that every product is exact
    view = make_view(pruner, x, GRIDS[12])
    same = {name: torch.full_like(getattr(view, name), 1 / 8) for name in token_fields(view)}
    with torch.no_grad():
        selection = pruner(replace(view, **same), torch.arange(1, 13))
    for keep, score in zip(selection.keep_BV, selection.scores_BV, strict=True):
        for value in score.unique():
            tied = keep[score == value].long()
            assert (tied.diff() <= 0).all(), "a later token was kept before an earlier one of the same score"


def token_fields(view: TokenView) -> list[str]:
    """Views of a field beside the hidden states that have a dimension for the vision tokens."""
    plain = {"vision_BVD", "valid_BV", "row_BV", "col_BV", "tile_BV", "image_BV", "input_valid_BU"}
    return [
        name
        for name, value in vars(view).items()
        if isinstance(value, Tensor) and name not in plain and name.partition("_B")[2][-2:].strip("DC")[-1:] in "VU"
    ]


@every_rule
def test_config_round_trip(config: dict[str, Any]) -> None:
    pruner = make_pruner(config)
    again = create(pruner.config())
    assert type(again) is type(pruner)
    assert again.config() == pruner.config()
    said = again.config()
    assert contains(said, config)
    assert json.loads(json.dumps(said)) == said, "plain values, as a checkpoint holds them"
    again.build(D)
    again.load_state_dict(pruner.state_dict())
    view = make_view(pruner, features(2, 12), GRIDS[12])
    with torch.no_grad():
        assert torch.equal(pruner(view, torch.tensor([3, 5])).keep_BV, again.eval()(view, torch.tensor([3, 5])).keep_BV)
        copied = copy.deepcopy(pruner)
        assert torch.equal(pruner(view, torch.tensor([3, 5])).keep_BV, copied(view, torch.tensor([3, 5])).keep_BV)


def contains(whole: Any, given: Any) -> bool:
    """Whether a config says what was given; a part may be given by its name, or with some of its arguments."""
    if not isinstance(whole, dict):
        return bool(whole == given)
    given = {"type": given} if isinstance(given, str) else given
    return all(contains(whole[name], value) for name, value in given.items())


AWKWARD = ("constant", "zero", "duplicated", "peaky", "tiny")


def awkward(name: str) -> Tensor:
    x = features(12, 12)
    if name == "constant":
        return torch.full_like(x, 0.3)
    if name == "zero":
        return torch.zeros_like(x)
    if name == "duplicated":
        return x[:, :3].repeat(1, 4, 1)
    if name == "peaky":
        x = x * 1e3
        x[:, 5] *= 1e4
        return x
    return x * 1e-8


def odd(value: Tensor, kind: str) -> Tensor:
    """A further view as odd as the hidden states: nothing anywhere, or all of it on one token."""
    if kind in ("constant", "duplicated"):
        return torch.full_like(value, 1 / 12)
    if kind == "peaky":
        peak = torch.zeros_like(value)
        peak[..., 0] = 1.0
        return peak
    return value * (0.0 if kind == "zero" else 1e-8)


@every_pruner
def test_awkward_inputs_stay_finite_and_exact(config: dict[str, Any]) -> None:
    counts = list(range(1, 13))
    for kind, soft in itertools.product(AWKWARD, (False, True)):
        pruner, case = make_pruner(config).train(soft), f"{kind}, {'training' if soft else 'inference'}"
        x = awkward(kind).requires_grad_(soft)
        view = make_view(pruner, x, GRIDS[12], soft=soft)
        view = replace(view, **{name: odd(getattr(view, name), kind) for name in token_fields(view)})
        selection = pruner(view, torch.tensor(counts))
        assert selection.keep_BV.sum(1).tolist() == counts, case
        assert selection.scores_BV.isfinite().all(), case
        if selection.vision_BVD is not None:
            assert selection.vision_BVD.isfinite().all(), case
        if selection.gate_BV is not None:
            assert torch.allclose(selection.gate_BV.sum(1), torch.tensor(counts).float(), rtol=1e-3), case
            given = [x for x in (selection.vision_BVD, selection.value_gate_BV, selection.key_bias_BV) if x is not None]
            assert given, "a gate that acts on nothing"
            (selection.gate_BV.square().sum() + sum(x.sum() for x in given)).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in pruner.parameters()), case


@every_pruner
def test_bf16_equals_fp32(config: dict[str, Any]) -> None:
    """Same numbers in another dtype: well separated scores must give the same tokens."""
    pruner = make_pruner(config)
    view = make_view(pruner, features(4, 12), GRIDS[12])
    names = [n for n, v in vars(view).items() if isinstance(v, Tensor) and v.is_floating_point()]
    half = replace(view, **{n: getattr(view, n).bfloat16() for n in names})
    full = replace(view, **{n: getattr(view, n).bfloat16().float() for n in names})
    counts = torch.tensor([1, 3, 6, 12])
    with torch.no_grad():
        a, b = pruner(half, counts), pruner(full, counts)
    assert torch.equal(a.keep_BV, b.keep_BV)
    if a.vision_BVD is not None:
        assert a.vision_BVD.dtype == torch.bfloat16


@every_pruner
def test_gate_is_exact_and_differentiable(config: dict[str, Any]) -> None:
    pruner = make_pruner(config).train()
    counts = list(range(1, 13))
    selection = pruner(make_view(pruner, features(12, 12), GRIDS[12], soft=True), torch.tensor(counts))
    # One that trains on cut sequences does so on hidden ones, too, without gates that keep the full length.
    assert (selection.gate_BV is not None) == (pruner.learned and not pruner.trainable_when_cut)
    if selection.gate_BV is None:
        return
    gate = selection.gate_BV
    assert torch.allclose(gate.sum(1), torch.tensor(counts).float(), rtol=1e-4)
    assert ((gate >= 0) & (gate <= 1)).all()
    (gate * torch.randn(gate.shape)).sum().backward()
    grads = [p.grad for p in pruner.parameters()]
    assert any(g is not None and g.abs().max() > 1e-8 for g in grads)
    assert all(g is None or g.isfinite().all() for g in grads)
    inference = make_pruner(config)
    hard = inference(make_view(inference, features(12, 12), GRIDS[12], soft=True), torch.tensor(counts))
    assert hard.gate_BV is None
    assert torch.equal(hard.keep_BV, selection.keep_BV), "training and inference must retain the same tokens"


@every_pruner
def test_one_token_and_full_budget(config: dict[str, Any]) -> None:
    assert run(config, features(2, 1), [1, 1]).keep_BV.all()
    full = run(config, features(2, 12), [12, 12])
    assert full.keep_BV.all()
    if full.vision_BVD is not None:
        # Merging nothing changes nothing; what a projector makes anew is what it made before.
        pruner = make_pruner(config)
        view = make_view(pruner, features(2, 12), GRIDS[12])
        same = view.vision_BVD if view.project is None else view.project(view.projector_BVC)
        near = (full.vision_BVD - view.vision_BVD).abs().amax(-1).minimum((full.vision_BVD - same).abs().amax(-1))
        assert near.max() < 1e-6


@every_rule
def test_does_not_change_its_inputs(config: dict[str, Any]) -> None:
    pruner, counts = make_pruner(config), torch.tensor([2, 7])
    view = make_view(pruner, features(2, 12), GRIDS[12])
    before = {k: v.clone() for k, v in vars(view).items() if isinstance(v, Tensor)}
    pruner(view, counts)
    assert all(torch.equal(v, getattr(view, k)) for k, v in before.items())
    assert counts.tolist() == [2, 7]
