"""What every registered scorer promises, with its defaults and its variants."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from no_sync import NoSync
from pruners.scorer_views import (
    CONFIGS,
    GRIDS,
    LEARNED,
    READERS,
    D,
    dead_weights,
    every_learner,
    every_reader,
    every_scorer,
    make,
    pad_words,
    total,
    view_of,
    wordless,
)
from support import answer_labels, batch, config_id, pad_view, scramble, tiny_model, view_rows
from torch import Tensor, nn

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import create
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.registry import create_part, list_parts
from tpcompress.pruners.topk import keep_topk, standardise

# ------------------------------------------------------------------------------------------------------ contracts


def test_variants_name_registered_scorers() -> None:
    assert {c["type"] for c in LEARNED} == set(list_parts("scorer")) - {"free"}
    assert len(list_parts("scorer")) >= 7
    assert READERS


@every_scorer
@pytest.mark.parametrize("V", GRIDS)
def test_one_finite_fp32_score_per_token(config: dict[str, Any], V: int) -> None:
    scorer = make(config)
    with torch.no_grad():
        scores = scorer(view_of(scorer, 2, V)).scores_BV
    assert scores.shape == (2, V)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert V == 1 or (scores.std(1) > 0).all()


@every_scorer
def test_rows_depend_on_no_partner_and_no_padding(config: dict[str, Any]) -> None:
    scorer = make(config)
    view = view_of(scorer, 4)
    with torch.no_grad():
        together = scorer(view)
        padded = scorer(pad_view(view, 5, (5, 5)))
        for b in range(4):
            alone = scorer(view_rows(view, [b]))
            assert torch.allclose(alone.scores_BV[0], together.scores_BV[b], atol=1e-5)
    assert torch.allclose(padded.scores_BV[:, :12], together.scores_BV, atol=1e-5)
    assert padded.scores_BV.isfinite().all()
    if together.votes_BVV is not None:
        assert torch.allclose(padded.votes_BVV[:, :12, :12], together.votes_BVV, atol=1e-5)
    if scorer.learned:
        other = scorer(replace(view, vision_BVD=view.vision_BVD.flip(0)))
        assert not torch.allclose(other.scores_BV, together.scores_BV, atol=1e-3), "control: tokens matter"


@every_reader
def test_padded_words_change_nothing(config: dict[str, Any]) -> None:
    scorer = make(config).train()
    view = view_of(scorer)
    with torch.no_grad():
        plain, padded = scorer(view), scorer(pad_words(view, 4, 3))
        other = scorer(replace(view, text_BSD=view.text_BSD.flip(0)))
    assert torch.allclose(padded.scores_BV, plain.scores_BV, atol=1e-5)
    if plain.text_BSD is not None:
        words = view.text_role_BS > 0
        assert torch.allclose(padded.text_BSD[:, 4:-3][words], plain.text_BSD[words], atol=1e-5)
    assert not torch.allclose(other.scores_BV, plain.scores_BV, atol=1e-3), "control: words matter"


@every_learner
def test_gradient_reaches_every_weight(config: dict[str, Any]) -> None:
    scorer = make(config)
    assert dead_weights(scorer, view_of(scorer)) == []
    scorer.never_used = nn.Parameter(torch.ones(2))
    assert dead_weights(scorer, view_of(scorer)) == ["never_used"], "control"


@every_learner
def test_a_fresh_scorer_can_learn(config: dict[str, Any]) -> None:
    """Through the scores as a selector sees them: standardised, so that shifts and scales teach nothing."""
    scorer = make(config, fresh=True)
    view = view_of(scorer)
    total(Scores(standardise(scorer(view).scores_BV, view.valid_BV))).backward()
    assert sum(p.grad.abs().sum() for p in scorer.parameters() if p.grad is not None) > 1e-2


@every_scorer
def test_config_round_trip(config: dict[str, Any]) -> None:
    scorer = make(config)
    plain = json.loads(json.dumps(scorer.config()))
    assert plain == scorer.config(), "plain values, as a checkpoint holds them"
    assert {k: v for k, v in config.items() if k != "pruner"}.items() <= plain.items()
    again = create_part("scorer", plain)
    assert type(again) is type(scorer)
    assert again.config() == plain
    again.build(D)
    again.load_state_dict(scorer.state_dict())
    view = view_of(scorer)
    with torch.no_grad():
        for same in (again.eval(), copy.deepcopy(scorer)):
            assert torch.equal(same(view).scores_BV, scorer(view).scores_BV)


@every_learner
def test_weights_are_made_once(config: dict[str, Any]) -> None:
    scorer = create_part("scorer", dict(config))
    assert not list(scorer.parameters())
    with pytest.raises(RuntimeError, match=f"{scorer.name} has no weights yet"):
        scorer(view_of(scorer))
    torch.set_default_dtype(torch.bfloat16)
    try:
        scorer.build(D)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in scorer.parameters()} == {torch.float32}
    before = {name: p.clone() for name, p in scorer.named_parameters()}
    scorer.build(D)
    assert all(torch.equal(p, before[name]) for name, p in scorer.named_parameters())
    with pytest.raises(ValueError, match=rf"This {scorer.name} was built for width 16, the model has 24; make a new"):
        scorer.build(24)


@every_learner
def test_arithmetic_is_fp32(config: dict[str, Any]) -> None:
    """Whatever the dtype of the hidden states, under autocast, and if the weights are cast with the model."""
    scorer = make(config)
    view = view_of(scorer)
    names = [n for n, v in vars(view).items() if isinstance(v, Tensor) and v.is_floating_point()]
    half = replace(view, **{n: getattr(view, n).bfloat16() for n in names})
    full = replace(view, **{n: getattr(view, n).bfloat16().float() for n in names})
    with torch.no_grad():
        expected = scorer(full).scores_BV
        assert torch.equal(scorer(half).scores_BV, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(scorer(full).scores_BV, expected)
        cast = copy.deepcopy(scorer).bfloat16()
        assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
        rounded = copy.deepcopy(cast).float()
        assert torch.equal(cast(half).scores_BV, rounded(full).scores_BV)
    assert not torch.equal(rounded(full).scores_BV, expected), "control: rounded weights score otherwise"
    total(cast(half)).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in cast.parameters())


@every_scorer
def test_equal_tokens_are_told_apart_reproducibly(config: dict[str, Any]) -> None:
    scorer, count = make(config), torch.tensor([4, 4, 4])
    view = view_of(scorer)
    view = replace(view, vision_BVD=torch.full_like(view.vision_BVD, 0.3))
    with torch.no_grad():
        keep = keep_topk(scorer(view).scores_BV, view.valid_BV, count)
        wide = pad_view(view, 5, (5, 5))
        assert torch.equal(keep_topk(scorer(wide).scores_BV, wide.valid_BV, count)[:, :12], keep)
        for b in range(3):
            row = view_rows(view, [b])
            assert torch.equal(keep_topk(scorer(row).scores_BV, row.valid_BV, count[:1])[0], keep[b])


@pytest.mark.parametrize("name", ["linear", "mlp", "mean_key", "cross_attention"])
def test_equal_tokens_are_chosen_all_over_the_row(name: str) -> None:
    for fresh in (True, False):
        scorer = make({"type": name}, fresh)
        view = view_of(scorer, 3, 35)
        view = replace(view, vision_BVD=torch.full_like(view.vision_BVD, 0.3))
        with torch.no_grad():
            keep = keep_topk(scorer(view).scores_BV, view.valid_BV, torch.tensor([8, 8, 8]))
        for quarter in (slice(0, 9), slice(9, 18), slice(18, 27), slice(27, 35)):
            assert (keep[:, quarter].sum(1) >= 1).all()


@every_scorer
def test_a_row_of_nothing_and_a_prompt_without_words(config: dict[str, Any]) -> None:
    scorer = make(config).train()
    view = view_of(scorer)
    assert view.valid_BV.all()
    valid = view.valid_BV.clone()
    valid[1] = False
    views = [replace(view, valid_BV=valid)]
    if "text" in scorer.needs:
        views += [wordless(view), wordless(views[0])]
    for odd in views:
        scores = scorer(odd)
        assert scores.scores_BV.isfinite().all()
        assert scores.text_BSD is None or scores.text_BSD.isfinite().all()
        if scorer.learned:
            scorer.zero_grad()
            total(scores).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in scorer.parameters())
    with torch.no_grad():
        assert torch.allclose(scorer(views[0]).scores_BV[::2], scorer(view).scores_BV[::2], atol=1e-5)


@every_reader
def test_without_words_nothing_of_the_sequence_is_read(config: dict[str, Any]) -> None:
    """What is no word of the prompt may be the answer."""
    scorer = make(config)
    view = view_of(scorer)
    with torch.no_grad():
        plain = scorer(wordless(view)).scores_BV
        assert torch.equal(scorer(wordless(replace(view, text_BSD=view.text_BSD.flip(0)))).scores_BV, plain)
        assert torch.allclose(scorer(pad_words(wordless(view), 4, 3)).scores_BV, plain, atol=1e-5)


@every_scorer
def test_no_score_makes_the_host_wait(config: dict[str, Any]) -> None:
    scorer = make(config).train()
    view = view_of(scorer)
    with NoSync() as guard:
        scores = scorer(view)
        if scorer.learned:
            scores.scores_BV.square().sum().backward()
    assert guard.seen > 0


@every_scorer
def test_odd_numbers_stay_finite(config: dict[str, Any]) -> None:
    scorer = make(config)
    view = view_of(scorer)
    for factor in (0.0, 1e-8, 1e4):
        x = (view.vision_BVD * factor).requires_grad_()
        scores = scorer(replace(view, vision_BVD=x)).scores_BV
        assert scores.isfinite().all()
        if scorer.learned:
            scores.square().sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if list_parts("scorer")[c["type"]].untrained_equivalent], ids=config_id
)
def test_it_starts_as_it_says(config: dict[str, Any]) -> None:
    scorer = make(config, fresh=True)
    view, count = view_of(scorer, 3, 35), torch.tensor([7, 1, 20])
    x = view.vision_BVD - view.vision_BVD.mean(-1, keepdim=True)  # norms take the mean off; angles stay
    view = replace(view, vision_BVD=x)
    rule = create(str(scorer.untrained_equivalent))(view, count).keep_BV
    with torch.no_grad():
        assert torch.equal(keep_topk(scorer(view).scores_BV, view.valid_BV, count), rule)
        other = scramble(scorer)(view).scores_BV
    assert not torch.equal(keep_topk(other, view.valid_BV, count), rule), "control: other weights choose otherwise"


@every_reader
def test_in_a_model_answers_and_partners_change_no_score(config: dict[str, Any]) -> None:
    """Left-padded samples with labels, each alone, and their prompts without answers."""
    gate = {"type": "learned_gate", "scorer": config, "selector": "topk", "applier": "gather"}
    model, inputs = tiny_model(), batch([(3, 1, 9), (5, 1, 9)])
    attach(model, PruningPlan([Stage(gate, 1, keep_ratio=0.25)]))
    scramble(model.token_pruners[0])
    labels, sequences = answer_labels(inputs, 4), ("input_ids", "attention_mask")

    def scores(train: bool, **call: Any) -> Tensor:
        with torch.no_grad(), record(model) as trace:
            model.train(train)(**call)
        return trace.stages[0].selection.scores_BV

    trained = scores(True, **inputs, labels=labels)
    prompts = {name: x[:, :-4] if name in sequences else x for name, x in inputs.items()}
    assert torch.allclose(scores(False, **prompts), trained, atol=1e-4)
    for b, width in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = {name: x[b : b + 1, -width:] if name in sequences else x[b : b + 1] for name, x in inputs.items()}
        assert torch.allclose(scores(True, **alone, labels=labels[b : b + 1, -width:])[0], trained[b], atol=1e-4)
    assert not torch.allclose(scores(False, **inputs), trained, atol=1e-2), "control: words of the prompt matter"


# ------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("pruner", "reason"),
    [
        ("learned_gate", "has weights of its own"),
        ("pool", "merges tokens"),
        ({"type": "divprune", "compat": True}, "chooses its own count"),
        ("vtw", "retains nothing"),
        ("os.path", "does not import 'os.path'"),
        ("divprun", "Did you mean divprune"),
    ],
)
def test_free_refuses(pruner: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        create_part("scorer", {"type": "free", "pruner": pruner})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "local_global", "width": 0}, "width >= 1, got 0"),
        ({"type": "mlp", "width": 6}, "multiple of 4, got 6"),
        ({"type": "mean_key", "width": 0}, "width >= 1, got 0"),
        ({"type": "cross_attention", "width": 0}, "width >= 1, got 0"),
        ({"type": "twig", "layers": 0}, "layers, heads and expand >= 1, got 0, 8, 2"),
        ({"type": "linear", "width": 3}, "it takes no arguments"),
    ],
)
def test_arguments_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_part("scorer", config)
