"""The formulas of each scorer, and what it can learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruners.scorer_views import (
    CONFIGS,
    GRIDS,
    D,
    every_learner,
    features,
    make,
    pad_words,
    view_of,
    view_over,
)
from support import batch, config_id, make_view, tiny_model
from torch import Tensor

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.base import BETWEEN, INSTRUCTION, SYSTEM
from tpcompress.pruners.scorers.mean_key import mean_key_score
from tpcompress.pruners.scorers.weighted import TIE, spread
from tpcompress.pruners.topk import keep_topk, standardise
from tpcompress.training.losses.imitate import choice_loss, scores_loss

# ------------------------------------------------------------------------------------------------------- learning


def rank_correlation(a_BV: Tensor, b_BV: Tensor) -> float:
    """Spearman's, mean over rows."""
    ranks = [standardise(x.argsort(1).argsort(1), torch.ones_like(x, dtype=torch.bool)) for x in (a_BV, b_BV)]
    return float((ranks[0] * ranks[1]).mean())


@every_learner
@pytest.mark.parametrize("kind", ["scores", "choice"])
def test_it_learns_to_imitate_a_linear_rule(config: dict[str, Any], kind: str) -> None:
    g = torch.Generator().manual_seed(5)
    rule_D, common_D = torch.randn(D, generator=g), torch.randn(D, generator=g)
    scorer = make(config, fresh=True).train()

    def rows(seed: int) -> tuple[TokenView, Tensor]:
        x_BVD = features(16, 12, seed) + common_D
        return view_over(scorer, x_BVD), x_BVD @ rule_D

    held_out, truth = rows(7000)
    optimizer = torch.optim.Adam(scorer.parameters(), 2e-2)
    with torch.no_grad():
        before = rank_correlation(scorer(held_out).scores_BV, truth)
    for step in range(30):
        view, target_BV = rows(9000 + step * 3)
        scores_BV = standardise(scorer(view).scores_BV, view.valid_BV)
        if kind == "scores":
            loss_B = scores_loss(scores_BV, target_BV, view.valid_BV, 0.5)
        else:
            loss_B = choice_loss(scores_BV, keep_topk(target_BV, view.valid_BV, torch.full((16,), 4)), view.valid_BV)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = rank_correlation(scorer(held_out).scores_BV, truth)
    assert before < 0.6
    assert after > (0.8 if kind == "scores" else 0.6)


# ------------------------------------------------------------------------------------------------------- formulas


def test_spread_is_even_and_small() -> None:
    valid = torch.ones(1, 576, dtype=torch.bool)
    value = spread(valid)[0]
    assert len(value.unique()) == 576
    assert value.min() >= 0
    assert value.max() < TIE
    for k in (8, 64, 192):
        chosen = keep_topk(value[None], valid, torch.tensor([k]))[0].nonzero()[:, 0]
        gaps = chosen.diff()
        assert gaps.max() <= 4 * 576 / k, "no part of the row is left out"


def test_mean_key_is_the_mean_logit_of_self_attention() -> None:
    query, key, valid = features(3, 35)[..., :8], features(3, 35, 5)[..., :8], torch.ones(3, 35, dtype=torch.bool)
    valid[1, 20:] = False
    fast = mean_key_score(query, key, valid)
    for b in range(3):
        logits = query[b] @ key[b, valid[b]].mT / 8**0.5
        assert torch.allclose(fast[b], logits.mean(1), atol=1e-6)
    packed = (query @ key.flatten(0, 1).mT / 8**0.5).mean(-1)
    assert not torch.allclose(fast, packed, atol=1e-2), "control: the mean over the whole batch is another score"


def test_fresh_cross_attention_is_lightvla() -> None:
    scorer = make({"type": "cross_attention", "width": None, "union": True}, fresh=True)
    view = view_of(scorer)
    scores = scorer(view)
    for b in range(3):
        x, t = (F.rms_norm(z, (D,), eps=1e-6) for z in (view.vision_BVD[b], view.text_BSD[b, view.text_valid_BS[b]]))
        read = F.rms_norm((x @ t.mT / D**0.5).softmax(-1) @ t, (D,), eps=1e-6)
        votes = read @ x.mT / D**0.5
        assert torch.allclose(scores.votes_BVV[b], votes + spread(view.valid_BV)[b], atol=1e-5)
        assert torch.equal(scores.votes_BVV[b].argmax(-1), votes.argmax(-1))
    assert torch.allclose(scores.scores_BV, scores.votes_BVV.mean(1), atol=1e-5)
    assert make({"type": "cross_attention"})(view).votes_BVV is None


def answered(view: TokenView, answers: int) -> TokenView:
    """The same prompt with answers behind it."""
    B = len(view.valid_BV)
    more = replace(pad_words(view, 0, answers), text_BSD=torch.cat([view.text_BSD, features(B, answers, 77)], 1))
    assert (more.text_role_BS[:, -answers:] == 0).all()
    return more


@pytest.mark.parametrize("config", [c for c in CONFIGS if c["type"] == "twig"], ids=config_id)
def test_twig_sees_nothing_that_comes_later(config: dict[str, Any]) -> None:
    twig = make(config).train()
    view = view_of(twig)
    long, prompt = answered(view, 5), view.text_BSD.shape[1]
    text = long.text_BSD.clone()
    text[:, prompt + 2] += 1.0
    changed = replace(long, text_BSD=text)
    with torch.no_grad():
        short, plain, other = twig(view), twig(long), twig(changed)
    assert torch.allclose(plain.scores_BV, short.scores_BV, atol=1e-5), "an answer changes no score"
    assert torch.equal(other.scores_BV, plain.scores_BV)
    difference_S = (other.text_BSD - plain.text_BSD).abs().amax((0, 2))
    assert (difference_S[: prompt + 2] == 0).all()
    assert (difference_S[prompt + 2 :] > 1e-5).all(), "control: later answers see an earlier one"
    assert twig.eval()(view).text_BSD is None, "nobody wants it in inference"


def test_twig_words_see_images_and_images_see_the_words_before() -> None:
    twig = make({"type": "twig"}).train()
    view = view_of(twig)
    text, image = view.text_BSD.clone(), view.vision_BVD.clone()
    text[:, 1] += 1.0  # a word before the image
    image[:, 3] += 1.0
    with torch.no_grad():
        plain = twig(view)
        other_word, other_image = twig(replace(view, text_BSD=text)), twig(replace(view, vision_BVD=image))
    assert (other_word.scores_BV - plain.scores_BV).abs().max() > 1e-4
    moved_S = (other_image.text_BSD - plain.text_BSD).abs().amax((0, 2))
    assert (moved_S[view.text_role_BS[0] == SYSTEM] == 0).all(), "words before the image do not see it"
    assert (moved_S[view.text_role_BS[0] == INSTRUCTION] > 1e-6).all()


def test_twig_scores_are_attention() -> None:
    """One block, one head: softmax of q k / sqrt(D) of the last word over everything before it, in logarithms."""
    twig = make({"type": "twig", "layers": 1, "heads": 1})
    view = view_of(twig)
    scores = twig(view).scores_BV
    for b in range(3):
        words = view.text_BSD[b, view.text_role_BS[b] > 0]
        x = twig.last.norm(torch.cat([view.vision_BVD[b], words]))
        row = (twig.last.query(x[-1]) @ twig.last.key(x).mT / D**0.5).softmax(-1)
        assert torch.allclose(scores[b], row[:12].log() + spread(view.valid_BV)[b], atol=1e-5)


def test_twig_asks_the_last_image_token_if_no_word_follows() -> None:
    twig = make({"type": "twig"})
    view = view_of(twig)
    before = replace(view, text_role_BS=view.text_role_BS.masked_fill(view.text_role_BS != SYSTEM, 0))
    with torch.no_grad():
        assert twig(before).scores_BV.std(1).min() > 1e-2, "words before an image do not see it"


def test_twig_takes_the_sequence_as_it_stands() -> None:
    """A word between two halves of the tokens sees the first half alone; what stands in their columns is not read."""
    twig = make({"type": "twig"}).train()
    view = view_of(twig)
    order_S = torch.tensor([*range(9), 17, *range(9, 17), *range(18, 23)])  # a word between
    column_V = torch.tensor([*range(3, 9), *range(10, 16)])
    fields = {name: getattr(view, name)[:, order_S] for name in ("text_BSD", "text_role_BS", "text_valid_BS")}
    fields["text_role_BS"] = fields["text_role_BS"].index_fill(1, torch.tensor(9), BETWEEN)
    view = replace(view, column_BV=column_V.expand(3, 12), **fields)
    loud = replace(view, text_BSD=view.text_BSD.index_fill(1, column_V, 1e3))
    first, second = (view.vision_BVD.index_add(1, torch.tensor([v]), torch.ones(3, 1, D)) for v in (2, 9))
    with torch.no_grad():
        plain, same = twig(view), twig(loud)
        moved_S = [
            (twig(replace(view, vision_BVD=x)).text_BSD - plain.text_BSD).abs().amax((0, 2)) for x in (first, second)
        ]
    assert torch.equal(same.scores_BV, plain.scores_BV)
    assert torch.equal(same.text_BSD, plain.text_BSD)
    assert [bool(moved[9] > 1e-6) for moved in moved_S] == [True, False]
    assert all(moved[18:].min() > 1e-6 for moved in moved_S), "control: words behind both halves see both"
    deaf = replace(view, text_role_BS=view.text_role_BS.index_fill(1, torch.tensor(9), 0))
    with torch.no_grad():
        assert not torch.allclose(twig(deaf).scores_BV, plain.scores_BV, atol=1e-4), "control: that word counts"


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_are_those_of_the_vision_tokens(side: str) -> None:
    """At each of two stages, with padding and two images in one prompt."""
    model = tiny_model()
    inputs = batch([(4, 2, 6), (2, 1, 3)], side=side)
    twigs = [{"type": "learned_gate", "scorer": {"type": "twig", "layers": 1, "heads": 2, "expand": 1}} for _ in "12"]
    attach(model, PruningPlan([Stage(twigs[0], 1, keep_tokens=20), Stage(twigs[1], 2, keep_tokens=9)]))
    with record(model) as trace, torch.no_grad():
        model(**inputs)
    for stage, width in zip(trace.stages, (64, 20), strict=True):
        view = stage.view
        there_RVD = view.text_BSD.gather(1, view.column_BV[..., None].expand_as(view.vision_BVD))
        assert view.valid_BV.sum(1).tolist() == [width] * 3
        assert torch.equal(there_RVD, view.vision_BVD)
        assert (view.text_role_BS.gather(1, view.column_BV) == 0).all()
    assert not torch.equal(view.column_BV[0], view.column_BV[1]), "control: each row has its own"


@pytest.mark.parametrize("name", ["novelty", "fastv", "divprune", "cdpruner", "fastervlm"])
def test_free_scores_choose_as_their_pruner(name: str) -> None:
    scorer, rule = make({"type": "free", "pruner": {"type": name}}), create(name)
    view, count = make_view(rule, features(3, 35), GRIDS[35]), torch.tensor([4, 9, 30])
    assert scorer.needs == rule.needs
    assert scorer.prompt_dependent == rule.prompt_dependent
    with torch.no_grad():
        assert torch.equal(keep_topk(scorer(view).scores_BV, view.valid_BV, count), rule(view, count).keep_BV)


def test_free_hands_on_the_layers_of_the_tower() -> None:
    rule = {"type": "hiprune", "object_layer": 0}
    assert make({"type": "free", "pruner": rule}).tower_layers == create(dict(rule)).tower_layers
    assert make({"type": "linear"}).tower_layers != create(dict(rule)).tower_layers
