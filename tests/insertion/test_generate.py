"""Generation of LLaVA: what one family shows for all. What every class needs is in tests/matrix/test_generate.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import PLACEHOLDER, TOKENS, batch, every_placed, generate, logit_gap, new_tokens, one_sample
from transformers import StaticCache

from tpcompress.insertion.attach import attach, detach, mode
from tpcompress.insertion.plan import PruningPlan, Stage

LEFT = [(5, 2, 7), (9, 2, 8)]
RAGGED = [(5, 1, 7), (3, 2, 8), (4, 0, 9)]
SINGLE = [(5, 1, 7)]

PLANS = {
    "stage 0": [Stage("uniform", 0, keep_ratio=0.5)],
    "layer 2": [Stage("divprune", 2, keep_ratio=0.25)],
    "three": [
        Stage("pool", 0, keep_tokens=40),
        Stage("divprune", 2, keep_tokens=17),
        Stage("random", 4, keep_tokens=5),
    ],
}
every_plan = pytest.mark.parametrize("name", PLANS)
both_positions = pytest.mark.parametrize("positions", ["original", "compact"])


@both_positions
@every_plan
def test_one_sample_cached_equals_recomputed(model: Any, name: str, positions: str) -> None:
    inputs = batch(SINGLE)
    plain = generate(model, inputs)
    attach(model, PruningPlan(PLANS[name], positions=positions))
    cached = generate(model, inputs)
    recomputed = generate(model, inputs, use_cache=False)
    static = generate(model, inputs, cache_implementation="static")
    with mode(model, "mask"):
        masked = generate(model, inputs)
    for other in (recomputed, static, masked):
        assert torch.equal(cached.sequences, other.sequences)
        assert logit_gap(cached, other) < 1e-5
    assert logit_gap(cached, plain) > 0.05, "control: pruning must change the logits"


@every_placed(2, 0)
def test_every_pruner_batch_equals_alone(model: Any, config: dict[str, Any], layer: int) -> None:
    inputs = batch(RAGGED)
    attach(model, PruningPlan([Stage(config, layer, keep_tokens=9)]))
    together = generate(model, inputs)
    static = generate(model, inputs, cache_implementation="static")
    assert torch.equal(together.sequences, static.sequences)
    for b in range(len(RAGGED)):
        alone = generate(model, one_sample(inputs, b))
        assert torch.equal(new_tokens(alone)[0], new_tokens(together)[b])
        gap = max((x[0] - y[b]).abs().max().item() for x, y in zip(alone.logits, together.logits, strict=True))
        assert gap < 1e-5


def test_eager_equals_sdpa(model: Any, eager_model: Any) -> None:
    for name, stages in PLANS.items():
        attach(model, PruningPlan(stages))
        attach(eager_model, PruningPlan(stages))
        a, b = generate(model, batch(RAGGED)), generate(eager_model, batch(RAGGED))
        assert torch.equal(a.sequences, b.sequences), name
        assert logit_gap(a, b) < 1e-5
        detach(model)
        detach(eager_model)


def test_beams_equal_each_sample_alone(model: Any) -> None:
    inputs = batch(RAGGED)
    attach(model, PruningPlan(PLANS["three"]))
    together = generate(model, inputs, num_beams=3)
    for b in range(len(RAGGED)):
        assert torch.equal(new_tokens(generate(model, one_sample(inputs, b), num_beams=3))[0], new_tokens(together)[b])


def test_lengths_of_every_layer(model: Any) -> None:
    inputs = batch(SINGLE)
    length = inputs["input_ids"].shape[1]
    attach(model, PruningPlan([Stage("uniform", 1, keep_tokens=30), Stage("random", 4, keep_tokens=7)]))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    short = length - TOKENS
    assert [layer.keys.shape[2] for layer in cache.layers] == [length, *[short + 30] * 3, *[short + 7] * 2]
    out = generate(model, inputs, new=4)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [
        n + 3 for n in [length, *[short + 30] * 3, *[short + 7] * 2]
    ]
    detach(model)
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=30)]))
    out = generate(model, inputs, new=4)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {short + 33}


def test_padding_of_short_samples_is_not_cached(model: Any) -> None:
    """A sample without images must not keep the others at full length."""
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=4)]))
    out = generate(model, batch([(5, 2, 7), (4, 0, 3)]), new=2)
    assert out.past_key_values.layers[0].keys.shape[2] == (5 + 7 + 4 + 8) + 1


def test_inputs_embeds(model: Any) -> None:
    inputs = batch(SINGLE)
    attach(model, PruningPlan(PLANS["three"]))
    expected = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    out = generate(model, given)
    assert torch.equal(new_tokens(out), new_tokens(expected))
    assert logit_gap(out, expected) < 1e-5


@both_positions
@pytest.mark.parametrize("name", ["three"])
def test_decoding_by_hand_without_positions_and_mask(model: Any, name: str, positions: str) -> None:
    inputs = batch(SINGLE)
    attach(model, PruningPlan(PLANS[name], positions=positions))
    expected = generate(model, inputs, new=4)
    for with_mask in (True, False):
        given = dict(inputs)
        if not with_mask:
            del given["attention_mask"]
        with torch.no_grad():
            out = model(**given, use_cache=True)
            tokens, mask = [], inputs["attention_mask"]
            for step in range(4):
                logits = out.logits[:, -1].clone()
                assert (logits - expected.logits[step]).abs().max() < 1e-5
                logits[:, PLACEHOLDER] = -torch.inf
                tokens.append(logits.argmax(-1))
                mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
                more = {"attention_mask": mask} if with_mask else {}
                out = model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, **more)
        assert torch.equal(torch.stack(tokens, 1), new_tokens(expected, 4))


def test_mask_of_the_physical_cache_is_refused(model: Any) -> None:
    """After stage 0 a caller who counts the cache would pass a mask that is too short."""
    inputs = batch(SINGLE)
    attach(model, PruningPlan(PLANS["stage 0"]))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        short = torch.ones(1, cache.layers[0].keys.shape[2] + 1, dtype=torch.long)
        with pytest.raises(ValueError, match="mask"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache, attention_mask=short)


@both_positions
@every_plan
def test_a_conversation_continues_in_a_static_cache(model: Any, name: str, positions: str) -> None:
    inputs = batch(SINGLE)
    attach(model, PruningPlan(PLANS[name], positions=positions))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    first = generate(model, inputs, new=4, past_key_values=cache)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fresh = generate(model, again | {"pixel_values": inputs["pixel_values"]}, new=4)
    out = generate(model, again, new=4, past_key_values=first.past_key_values)
    assert torch.equal(out.sequences, fresh.sequences)
    assert logit_gap(out, fresh) < 1e-5


@every_plan
def test_new_tokens_alone_continue(model: Any, name: str) -> None:
    inputs = batch(SINGLE)
    attach(model, PruningPlan(PLANS[name]))
    more = torch.tensor([[11, 12, 13]])
    ids = torch.cat([inputs["input_ids"], more], 1)
    whole = batch(SINGLE) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(**whole).logits[:, -3:]
        for mask in (torch.ones_like(ids), None):
            cache = model(**inputs, use_cache=True).past_key_values
            out = model(input_ids=more, past_key_values=cache, attention_mask=mask).logits
            assert (out - expected).abs().max() < 1e-5


@every_plan
def test_chunked_prefill_of_a_static_cache_is_refused(model: Any, name: str) -> None:
    attach(model, PruningPlan(PLANS[name]))
    options = {"cache_implementation": "static", "disable_compile": True}
    with pytest.raises(ValueError, match="chunked prefill"):
        generate(model, batch(SINGLE), prefill_chunk_size=20, **options)


def test_requests_do_not_see_each_other(model: Any) -> None:
    """Two prompts decoded in turns, each with its own cache."""
    attach(model, PruningPlan(PLANS["three"], positions="compact"))
    prompts = [batch(SINGLE), batch([(9, 2, 4)], seed=2), batch([(4, 0, 4)], seed=3)]
    expected = [generate(model, p, new=3) for p in prompts]
    with torch.no_grad():
        outs = [model(**p, use_cache=True) for p in prompts]
        for step in range(3):
            for i, out in enumerate(outs):
                logits = out.logits[:, -1].clone()
                assert (logits - expected[i].logits[step]).abs().max() < 1e-5
                logits[:, PLACEHOLDER] = -torch.inf
                outs[i] = model(input_ids=logits.argmax(-1)[:, None], past_key_values=out.past_key_values)
