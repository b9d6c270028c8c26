"""What every selector promises."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from no_sync import NoSync
from pruners.selector_scores import CONFIGS, D, choose, every_selector, is_noisy, made, scored

from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.registry import create_part, list_parts


def test_variants_name_registered_selectors() -> None:
    assert len(list_parts("selector")) >= 8
    noisy = {config["type"] for config in CONFIGS if is_noisy(made(config))}
    assert {"gumbel", "gumbel_topk", "argmax_union"} <= noisy
    assert not {"topk", "soft_topk", "straight_through"} & noisy


@every_selector
def test_config_round_trip(config: dict[str, Any]) -> None:
    selector = made(config)
    again = made(selector.config())
    assert again.config() == selector.config() == json.loads(json.dumps(selector.config()))
    assert config.items() <= again.config().items()
    assert selector.learned == bool(list(selector.parameters()))
    for weight in selector.parameters():
        weight.data += 0.3
    again.load_state_dict(selector.state_dict())
    scores, valid = scored(3, 12)
    one, two = (choose(s, scores, valid, [2, 5, 9], True) for s in (selector, again))
    assert torch.equal(one.keep_BV, two.keep_BV)
    selector.build(D)
    assert all(weight.ne(0).any() for weight in selector.parameters()), "building twice changes nothing"


@every_selector
@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ragged", "constant", "peaky"])
def test_every_count_of_every_row(config: dict[str, Any], explore: bool, kind: str) -> None:
    selector, V = made(config), 12
    valid = torch.arange(V) < (torch.arange(1, V + 1)[:, None] if kind == "ragged" else V)
    valid = valid.expand(V, V)
    counts = [(r // 2) + 1 for r in range(V)] if kind == "ragged" else list(range(1, V + 1))
    scores, _ = scored(V, V, valid)
    if kind == "constant":
        scores = Scores(torch.zeros(V, V).requires_grad_(), votes_BVV=torch.zeros(V, V, V).requires_grad_())
    if kind == "peaky":
        peak = torch.zeros(V, V).index_fill_(1, torch.tensor(5), 300.0)
        scores = Scores(peak.requires_grad_(), votes_BVV=(peak[:, None] + torch.zeros(V, V, V)).requires_grad_())
    choice = choose(selector, scores, valid, counts, explore)
    assert choice.keep_BV.dtype == torch.bool
    assert not (choice.keep_BV & ~valid).any()
    assert choice.keep_BV.any(1).all(), "a row with tokens retains one"
    if selector.exact_count:
        assert choice.keep_BV.sum(1).tolist() == counts
    assert choice.scores_BV is scores.scores_BV
    parts = [t for t in (choice.gate_BV, choice.log_prob_B, choice.expected_B) if t is not None]
    assert explore or not parts, "noise and gates are for training"
    for part in parts:
        assert part.dtype == torch.float32
        assert part.isfinite().all()
    if choice.gate_BV is not None:
        assert ((choice.gate_BV >= 0) & (choice.gate_BV <= 1)).all()
        assert (choice.gate_BV[~valid] == 0).all()
    if parts:
        leaves = [scores.scores_BV, scores.votes_BVV, *selector.parameters()]
        grads = torch.autograd.grad(sum(p.square().sum() for p in parts), leaves, allow_unused=True)
        assert any(g is not None for g in grads)
        assert all(g is None or g.isfinite().all() for g in grads)


@every_selector
@pytest.mark.parametrize("explore", [False, True])
def test_one_token(config: dict[str, Any], explore: bool) -> None:
    scores, valid = scored(2, 1)
    choice = choose(made(config), scores, valid, [1, 1], explore)
    assert choice.keep_BV.all()
    if choice.log_prob_B is not None:
        assert choice.log_prob_B.abs().max() < 1e-6


@every_selector
def test_a_row_without_tokens_spoils_no_gradient(config: dict[str, Any]) -> None:
    valid = torch.tensor([[True] * 6, [False] * 6])
    scores, _ = scored(2, 6, valid)
    selector = made(config)
    choice = choose(selector, scores, valid, [3, 0], True)
    assert not choice.keep_BV[1].any()
    parts = [t for t in (choice.gate_BV, choice.log_prob_B, choice.expected_B) if t is not None]
    leaves = [scores.scores_BV, scores.votes_BVV, *selector.parameters()]
    if parts:
        grads = torch.autograd.grad(sum(p.square().sum() for p in parts), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


@every_selector
def test_inference_is_deterministic(config: dict[str, Any]) -> None:
    scores, valid = scored(3, 20)
    selector = made(config)
    one, two = (choose(selector, scores, valid, [2, 7, 20], False, seed) for seed in (0, 1))
    assert torch.equal(one.keep_BV, two.keep_BV)
    assert one.gate_BV is None
    assert one.log_prob_B is None


@every_selector
def test_rows_depend_on_no_partner_and_no_padding(config: dict[str, Any]) -> None:
    selector, counts = made(config), [1, 4, 11, 12]
    scores, valid = scored(4, 12)
    for explore in (False, True):
        if explore and is_noisy(selector):
            continue  # draws per token of the batch
        together = choose(selector, scores, valid, counts, explore)
        loud = torch.full((4, 5), 1e3)
        votes = torch.nn.functional.pad(scores.votes_BVV, (0, 5, 0, 5), value=1e3)
        wide = Scores(torch.cat([scores.scores_BV, loud], 1), votes_BVV=votes)
        padded = choose(selector, wide, torch.cat([valid, loud < 0], 1), counts, explore)
        assert torch.equal(padded.keep_BV[:, :12], together.keep_BV)
        assert not padded.keep_BV[:, 12:].any()
        for b in range(4):
            row = Scores(scores.scores_BV[b : b + 1], votes_BVV=scores.votes_BVV[b : b + 1])
            alone = choose(selector, row, valid[b : b + 1], counts[b : b + 1], explore)
            assert torch.equal(alone.keep_BV[0], together.keep_BV[b])
            if together.gate_BV is not None:
                assert torch.allclose(alone.gate_BV[0], together.gate_BV[b], atol=1e-5)
        if together.gate_BV is not None:
            assert torch.allclose(padded.gate_BV[:, :12], together.gate_BV, atol=1e-5)
        if together.expected_B is not None:
            assert torch.allclose(padded.expected_B, together.expected_B, atol=1e-4)


@every_selector
def test_no_choice_makes_the_host_wait(config: dict[str, Any]) -> None:
    selector, counts = made(config), torch.tensor([2, 7, 20])
    scores, valid = scored(3, 20)
    with NoSync() as guard:
        for explore in (False, True):
            selector(scores, valid, counts, explore)
    assert guard.seen > 5, "control: it ran under the guard"


# ------------------------------------------------------------------------------------- selectors that count themselves


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"type": "soft_topk", "relaxation": "gauss"}, "soft_topk has no relaxation 'gauss'; choose one of sigmoid, l"),
        ({"type": "straight_through", "temperature_end": 2.0}, "0 < temperature_end <= temperature_start"),
        ({"type": "gumbel", "temperature_end": 0.0}, "gumbel needs 0 < temperature_end"),
        ({"type": "gumbel_topk", "noise_start": 0.1}, "0 < noise_end <= noise_start"),
        ({"type": "threshold", "cap": 0.5}, "floor in .0, 1. and cap >= 1"),
        ({"type": "learned_budget", "spread": 1.0}, r"spread in \(0, 1\) and at least 2"),
        ({"type": "argmax_union", "noise": "normal"}, "no noise 'normal'; choose one of gumbel, uniform"),
        ({"type": "argmax_union", "cap": 0}, "positive cap"),
        ("soft_topkk", "No selector 'soft_topkk'.*Did you mean soft_topk?"),
    ],
)
def test_errors_name_the_way_out(config: str | dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_part("selector", config)
