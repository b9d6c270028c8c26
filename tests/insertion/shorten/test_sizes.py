"""Tokens that stand for several weigh more, and may stand at another's position: against a model at full length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exact import check, tolerance
from subjects import Subject, lent, ragged, recomputes
from support import PLACEHOLDER, alone, batch, generate, list_families, logit_gap, new_tokens, tiny_model
from torch import Tensor

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach, mode, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.shorten.masks import layer_mask
from tpcompress.insertion.shorten.sizes import add_log_sizes, concat_log_sizes
from tpcompress.pruners import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk


class Sized(Pruner):
    """Retains what a fixed rule says, whose sizes and places are as odd as can be."""

    name = "sized"
    uses_token_sizes = True

    def __init__(self, sizes: bool = True, places: bool = False, even: bool = False) -> None:
        super().__init__()
        self.sizes, self.places, self.even = sizes, places, even

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        V, device = tokens.valid_BV.shape[1], tokens.valid_BV.device
        count_B1, token_V = tokens.valid_BV.sum(1, keepdim=True), torch.arange(V, device=device)
        scores_BV = ((token_V * 37) % 23).float().expand_as(tokens.valid_BV)
        size_BV = 1.0 + (token_V % 7) if not self.even else torch.ones(V, device=device)
        return Selection(
            keep_topk(scores_BV, tokens.valid_BV, num_keep_B),
            scores_BV,
            size_BV=size_BV.expand_as(scores_BV) if self.sizes else None,
            # backwards, so that places neither rise nor belong to retained tokens
            place_BV=(count_B1 - 1 - token_V).clamp(min=0) if self.places else None,
        )


PLANS = {
    "stage 0": [Stage(Sized(), 0, keep_ratio=0.5)],
    "layer 2": [Stage(Sized(), 2, keep_ratio=0.25)],
    "places 0": [Stage(Sized(False, True), 0, keep_ratio=0.5)],
    "places 2": [Stage(Sized(False, True), 2, keep_ratio=0.5)],
    "twice": [Stage(Sized(True, True), 0, keep_ratio=0.6), Stage(Sized(True, True), 3, keep_ratio=0.3)],
    "then plain": [Stage(Sized(True, True), 0, keep_ratio=0.6), Stage("uniform", 2, keep_ratio=0.3)],
    "plain first": [Stage("divprune", 0, keep_ratio=0.6), Stage(Sized(), 4, keep_ratio=0.3)],
}
CASES = ["llava", "qwen2_vl", "gemma3"]


every_plan = pytest.mark.parametrize(
    ("subject", "name"),
    [
        pytest.param(
            family, name, marks=() if family == "llava" or (family in CASES and name == "twice") else pytest.mark.slow
        )
        for family in list_families()
        for name in PLANS
    ],
    indirect=["subject"],
)
"""Every plan on LLaVA; on the other quick families the one with sizes, places and two stages."""


@pytest.fixture(params=[pytest.param(n, marks=() if n in CASES else pytest.mark.slow) for n in list_families()])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield from lent((request.param, list_families()[request.param].tiny.variants[0]))


@every_plan
def test_equals_the_reference(subject: Subject, name: str) -> None:
    modes = ("mask",) if subject.hides else ()
    for positions in ("original", "compact") if name in ("stage 0", "layer 2") else ("original",):
        for inputs in (
            subject.batch(*ragged(subject)),
            subject.batch(*ragged(subject), side="right"),
            subject.batch((5, subject.kinds, 7)),
        ):
            plan = subject.plan(PLANS[name], positions=positions)
            check(subject.model, subject.base, plan, inputs, modes=modes)
            detach(subject.model)
    unmasked = subject.batch((5, subject.kinds, 7))
    del unmasked["attention_mask"]
    check(subject.model, subject.base, subject.plan(PLANS[name]), unmasked, modes=())


@every_plan
def test_cached_equals_recomputed(subject: Subject, name: str) -> None:
    samples = [(5, 1, 7), (3, subject.kinds, 8), (4, 0, 9)]
    inputs = subject.batch(*samples)
    attach(subject.model, subject.plan(PLANS[name]))
    cached = generate(subject.model, inputs, new=4)
    if recomputes(subject, inputs):
        assert logit_gap(cached, generate(subject.model, inputs, new=4, use_cache=False)) < tolerance(subject.model)
    static = generate(subject.model, inputs, new=4, cache_implementation="static", disable_compile=True)
    assert logit_gap(cached, static) < tolerance(subject.model)
    if subject.hides:
        with mode(subject.model, "mask"):
            assert logit_gap(cached, generate(subject.model, inputs, new=4)) < tolerance(subject.model)
    for b in range(len(samples)):
        single = generate(subject.model, alone(inputs, samples, b, subject.case[0], subject.config), new=4)
        gap = max((x[0] - y[b]).abs().max().item() for x, y in zip(single.logits, cached.logits, strict=True))
        assert gap < tolerance(subject.model)
        assert torch.equal(new_tokens(single, 4)[0], new_tokens(cached, 4)[b])


@pytest.mark.parametrize("name", ["stage 0", "layer 2", "twice"])
def test_a_conversation_keeps_its_sizes(subject: Subject, name: str) -> None:
    """A second question, from the cache and at once; in the decoding after it the sizes still count."""
    inputs = subject.batch((5, subject.kinds, 7))
    attach(subject.model, subject.plan(PLANS[name]))
    first = generate(subject.model, inputs, new=3)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    arguments = subject.family.tiny.arguments(subject.config, ids)
    pictures = {k: v for k, v in inputs.items() if k not in again and k not in arguments}
    fresh = generate(subject.model, again | arguments | pictures, new=3)
    out = generate(subject.model, again, new=3, past_key_values=first.past_key_values)
    assert logit_gap(out, fresh) < tolerance(subject.model)


@pytest.mark.parametrize("name", ["stage 0", "layer 2", "twice"])
def test_a_second_picture_and_its_sizes(model: Any, name: str) -> None:
    turns = [batch([(5, 1, 7)]), batch([(3, 1, 4)], seed=5)]
    ids = torch.cat([turn["input_ids"] for turn in turns], 1)
    mask, pixels = torch.ones_like(ids), torch.cat([turn["pixel_values"] for turn in turns])
    attach(model, PruningPlan(PLANS[name]))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=True)
        cache = model(**turns[0], use_cache=True).past_key_values
        out = model(**turns[1] | {"attention_mask": mask}, past_key_values=cache)
        assert (out.logits - expected.logits[:, -out.logits.shape[1] :]).abs().max() < 1e-5
        steps = [model(input_ids=torch.tensor([[17]]), past_key_values=o.past_key_values) for o in (out, expected)]
    assert (steps[0].logits - steps[1].logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_eager_attention(family: str) -> None:
    variant = list_families()[family].tiny.variants[0]
    model, base = (tiny_model(family, *variant, impl="eager") for _ in range(2))
    subject = Subject((family, variant), model, base)
    for name in ("stage 0", "twice"):
        check(model, base, subject.plan(PLANS[name]), subject.batch(*ragged(subject)), modes=())
        detach(model)


class First(Pruner):
    """Retains the first token, which stands for all."""

    name = "first"
    uses_token_sizes = True

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        first_BV = torch.arange(tokens.valid_BV.shape[1]).expand_as(tokens.valid_BV) == 0
        return Selection(
            first_BV, first_BV.float(), size_BV=tokens.valid_BV.sum(1, keepdim=True).expand(first_BV.shape)
        )


def test_a_size_is_that_many_equal_tokens(model: Any, base: Any) -> None:
    """To the words behind an image of equal tokens at one position, its first one counts for all: no mask says so."""
    inputs = batch([(5, 1, 7)])
    place = inputs["input_ids"][0] == PLACEHOLDER
    positions = (torch.arange(len(place)) - (place.cumsum(0) - 1).clamp(min=0))[None]
    last, results = len(resolve(base).layers) - 1, []

    def level(layer: Any, args: tuple) -> tuple:
        hidden = args[0].clone()
        hidden[0, place] = hidden[0, place][0]
        return hidden, *args[1:]

    for which in (base, model):
        with torch.no_grad(), resolve(which).layers[last].register_forward_pre_hook(level):
            if which is model:
                attach(model, PruningPlan([Stage(First(), last, keep_tokens=1)]))
            results.append(which(**inputs, position_ids=positions).logits[:, -9:])
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_a_callers_own_mask(model: Any, base: Any) -> None:
    """Additive or bool, 4-D: sizes are added to it."""
    inputs = batch([(5, 1, 7)])
    S = inputs["input_ids"].shape[1]
    attach(model, PruningPlan(PLANS["twice"]))
    with torch.no_grad():
        expected = model(**inputs).logits
        seen = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
        floats = torch.zeros(1, 1, S, S).masked_fill(~seen, torch.finfo(torch.float32).min)
        for own in (seen, floats):
            assert (model(**inputs | {"attention_mask": own}).logits - expected).abs().max() < 1e-5


def test_detach_takes_the_late_hooks_off(model: Any) -> None:
    layers = resolve(model).layers
    before = [len(layer._forward_pre_hooks) for layer in layers]
    inputs = batch([(5, 1, 7)])
    with torch.no_grad():
        untouched = model(**inputs).logits
        attach(model, PruningPlan(PLANS["stage 0"]))
        for _ in range(2):
            model(**inputs)
            assert [len(layer._forward_pre_hooks) for layer in layers] == [n + 1 for n in before], "once each"
        with mode(model, "off"):
            assert torch.equal(model(**inputs).logits, untouched)
        detach(model)
        assert [len(layer._forward_pre_hooks) for layer in layers] == before
        assert torch.equal(model(**inputs).logits, untouched)


def test_a_cache_meets_a_model_that_has_seen_no_size(model: Any, base: Any) -> None:
    """What a cache carries holds in another copy of the model, too."""
    inputs = batch([(5, 1, 7)])
    other = tiny_model()
    attach(model, PruningPlan(PLANS["stage 0"]))
    attach(other, PruningPlan(PLANS["stage 0"]))
    with torch.no_grad():
        one, two = (model(**inputs, use_cache=True).past_key_values for _ in range(2))
        given = {"input_ids": torch.tensor([[7]])}
        a, b = model(**given, past_key_values=one).logits, other(**given, past_key_values=two).logits
    assert torch.equal(a, b)


def test_compact_positions_ignore_places(model: Any) -> None:
    inputs, runs = batch([(5, 2, 7)]), []
    for places in (False, True):
        attach(model, PruningPlan([Stage(Sized(False, places), 2, keep_tokens=9)], positions="compact"))
        with torch.no_grad():
            runs.append(model(**inputs).logits)
        detach(model)
    assert torch.equal(*runs)


def test_attention_that_cannot_weigh_is_refused() -> None:
    config = tiny_model().config.get_text_config()
    hidden = torch.zeros(1, 5, 4)
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="which flash_attention_2 cannot: load the model with attn_implementation"):
        layer_mask(config, "full_attention", hidden, None, None, 0, None, None, torch.zeros(1, 5))
    assert layer_mask(config, "full_attention", hidden, None, None, 0) is None


def test_masks_by_hand() -> None:
    log = torch.tensor([[0.0, 2.0]])
    low = torch.finfo(torch.float32).min
    seen = torch.tensor([[[[True, False, False], [True, True, True]]]])
    assert add_log_sizes(seen, log, torch.float32).tolist() == [[[[0.0, low, low], [0.0, 2.0, 0.0]]]]
    floats = torch.tensor([[[[0.0, low, low], [1.0, 1.0, 1.0]]]])
    assert add_log_sizes(floats, log, torch.float32).tolist() == [[[[0.0, low, low], [1.0, 3.0, 1.0]]]]
    assert add_log_sizes(seen, log, torch.bfloat16).dtype == torch.bfloat16
    assert concat_log_sizes(None, 2, None, 3) is None
    assert concat_log_sizes(log, 2, None, 1).tolist() == [[0.0, 2.0, 0.0]]
    assert concat_log_sizes(None, 1, log, 2).tolist() == [[0.0, 0.0, 2.0]]
    assert concat_log_sizes(log, 2, log, 2).tolist() == [[0.0, 2.0, 0.0, 2.0]]


def test_sizes_of_stages_multiply(model: Any) -> None:
    """What a token stood for before comes with it: 2 of 3 are 6."""
    attach(model, PruningPlan(PLANS["twice"]))
    inputs = batch([(5, 1, 7)])
    with record(model) as trace, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    sizes = [cut.log_size_BN.exp().round().long() for cut in cache._tpcompress_state.cuts]
    first, second = (stage.selection for stage in trace.stages)
    before = first.size_BV[0, first.keep_BV[0]]
    expected = (before * second.size_BV[0])[second.keep_BV[0]].long().tolist()
    assert sizes[0][0, 5 : 5 + len(before)].tolist() == before.long().tolist()
    assert sizes[1][0, 5 : 5 + len(expected)].tolist() == expected
    assert max(expected) > 7
