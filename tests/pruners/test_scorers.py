"""What every registered scorer promises, with its defaults and its variants, and the formulas of each."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from no_sync import NoSync
from support import answer_labels, batch, config_id, make_view, pad_view, scramble, tiny_model, view_rows
from torch import Tensor, nn

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.base import BETWEEN, INSTRUCTION, SYSTEM
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.registry import create_part, list_parts
from tpcompress.pruners.scorers.mean_key import mean_key_score
from tpcompress.pruners.scorers.weighted import TIE, spread
from tpcompress.pruners.topk import keep_topk, standardise
from tpcompress.training.losses.imitate import choice_loss, scores_loss

D = 16
CONFIGS = [{"type": name, **more} for name, cls in list_parts("scorer").items() for more in ({}, *cls.test_arguments)]
LEARNED = [config for config in CONFIGS if create_part("scorer", dict(config)).learned]
READERS = [config for config in LEARNED if "text" in create_part("scorer", dict(config)).needs]
GRIDS = {1: (1, 1), 12: (3, 4), 35: (5, 7)}

every_scorer = pytest.mark.parametrize("config", CONFIGS, ids=config_id)
every_learner = pytest.mark.parametrize("config", LEARNED, ids=config_id)
every_reader = pytest.mark.parametrize("config", READERS, ids=config_id)


def make(config: dict[str, Any], fresh: bool = False) -> Any:
    scorer = create_part("scorer", dict(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer.build(D)
    return (scorer if fresh else scramble(scorer)).eval()


def features(B: int, V: int, seed: int = 0) -> Tensor:
    rows = [torch.randn(V, D, generator=torch.Generator().manual_seed(seed + 100 * b)) for b in range(B)]
    return torch.stack(rows)


def view_of(scorer: Any, B: int = 3, V: int = 12) -> TokenView:
    return view_over(scorer, features(B, V))


def view_over(scorer: Any, vision_BVD: Tensor) -> TokenView:
    view = make_view(scorer, vision_BVD, GRIDS[vision_BVD.shape[1]])
    return view if view.text_BSD is None else in_sequence(view)


def in_sequence(view: TokenView, before: int = 3) -> TokenView:
    """The same view with its vision tokens behind the first words of the sequence, as a model shows them."""
    B, V, _ = view.vision_BVD.shape

    def spliced(words: Tensor, vision: Tensor) -> Tensor:
        return torch.cat([words[:, :before], vision, words[:, before:]], 1)

    assert view.text_BSD is not None
    fields = {name: getattr(view, name) for name in ("text_role_BS", "text_valid_BS")}
    nothing = {name: value.new_zeros(B, V) for name, value in fields.items()}
    more = {name: spliced(value, nothing[name]) for name, value in fields.items()}
    more["text_BSD"] = spliced(view.text_BSD, view.vision_BVD)
    return replace(view, column_BV=(before + torch.arange(V)).expand(B, V), **more)


def pad_words(view: TokenView, left: int, right: int) -> TokenView:
    """The same view in a batch with a longer sequence; the padding is loud garbage."""
    fields = {
        name: F.pad(getattr(view, name), (0, 0, left, right) if name.endswith("D") else (left, right), value=value)
        for name, value in {"text_BSD": 1e3, "text_role_BS": 0, "text_valid_BS": False}.items()
    }
    return replace(view, column_BV=view.column_BV + left, **fields)


def wordless(view: TokenView) -> TokenView:
    assert view.text_role_BS is not None
    assert view.text_valid_BS is not None
    return replace(
        view, text_role_BS=torch.zeros_like(view.text_role_BS), text_valid_BS=torch.zeros_like(view.text_valid_BS)
    )


def total(scores: Scores, seed: int = 0) -> Tensor:
    """A random linear function of everything that a scorer answered."""
    g = torch.Generator().manual_seed(seed)
    given = [x for x in (scores.scores_BV, scores.text_BSD, scores.votes_BVV) if x is not None]
    return sum(((x * torch.randn(x.shape, generator=g)).sum() for x in given), torch.zeros(()))


def dead_weights(scorer: nn.Module, view: TokenView) -> list[str]:
    """Weights that no gradient reaches."""
    scorer.zero_grad()
    total(scorer.train()(view)).backward()
    return [name for name, p in scorer.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]


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


@pytest.mark.parametrize(
    ("pruner", "reason"),
    [
        ("learned_gate", "has weights of its own"),
        ("pool", "merges tokens"),
        ({"type": "divprune", "compat": True}, "counts for itself"),
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
