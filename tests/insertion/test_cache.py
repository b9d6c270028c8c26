"""What a KV cache carries: the request's state, the conversation's length, and nothing once it is reset."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import TOKENS, batch, generate
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from tpcompress.families import list_families
from tpcompress.insertion.attach import attach
from tpcompress.insertion.cache import STATE, counted_layer, forget, held_columns, on_host, recall, remember
from tpcompress.insertion.call import Call
from tpcompress.insertion.conversation import CachedPrefix, StageCut, join
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.settings import Placement, Settings

SHORT, WHOLE = SimpleNamespace(dropped=7), SimpleNamespace(dropped=0)
SETTINGS = Settings("drop", (), Placement((), {}, frozenset(), frozenset(), frozenset()))

V = True
o = False


def filled(columns: int = 5, layers: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.zeros(1, 1, columns, 4), torch.zeros(1, 1, columns, 4), layer)
    return cache


def test_lengths_of_a_conversation_and_of_a_layer() -> None:
    cache = filled()
    remember(cache, SHORT)
    assert cache.get_seq_length() == 12
    assert held_columns(cache) == cache.get_query_offset() == 5
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    assert cache.get_seq_length() == 14, "it grows with the answer"
    assert held_columns(cache) == 7
    assert recall(cache, 1) is recall(cache, 3) is SHORT


def test_without_dropped_columns_the_cache_is_left_alone() -> None:
    cache = filled()
    remember(cache, WHOLE)
    assert set(vars(cache)) - set(vars(filled())) == {STATE}
    assert cache.get_seq_length() == 5


def test_forget_and_reset() -> None:
    cache = filled()
    before = set(vars(cache))
    remember(cache, SHORT)
    forget(cache)
    assert set(vars(cache)) == before
    assert recall(cache, 1) is None
    remember(cache, SHORT)
    cache.crop(-5)
    assert cache.get_seq_length() == 0, "an empty cache stands for nothing"
    assert recall(cache, 1) is None
    assert set(vars(cache)) == before, "whoever empties a cache gets it as transformers made it"
    remember(cache, SimpleNamespace(dropped=1))
    assert recall(filled(), 1) is None


def test_a_later_state_replaces_an_earlier_one() -> None:
    cache = filled()
    remember(cache, SHORT)
    remember(cache, WHOLE)
    assert recall(cache, 1) is WHOLE
    assert cache.get_seq_length() == 5


def test_a_copy_of_a_cache_counts_its_own_columns() -> None:
    cache = filled()
    remember(cache, SHORT)
    other = copy.deepcopy(cache)
    other.update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), 0)
    assert other.get_seq_length() == 16
    assert cache.get_seq_length() == 12


def test_static_caches_answer_on_the_device() -> None:
    config = list_families()["llava"].tiny.config().get_text_config()
    cache = StaticCache(config=config, max_cache_len=16)
    state = torch.zeros(1, config.num_key_value_heads, 5, config.hidden_size // config.num_attention_heads)
    cache.update(state, state, 0)
    length = held_columns(cache)
    assert isinstance(length, torch.Tensor)
    assert not on_host(length, 1), "one step must not wait for a device"
    assert on_host(length, 2)
    assert on_host(5, 1)
    remember(cache, SHORT)
    assert int(cache.get_seq_length()) == 12
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert recall(cache, 9) is None


def test_the_counted_layer_is_the_first_with_attention() -> None:
    cache = filled()
    assert counted_layer(cache) == 0
    cache.layers = [LinearAttentionLayer(), LinearAttentionLayer(), DynamicLayer()]
    assert counted_layer(cache) == 2


# ------------------------------------------------------------------------------------------- what a request carries


def cut(layer: int, width: int, lost: int, padding: list[bool] | None = None) -> StageCut:
    mask = None if padding is None else torch.tensor([padding])
    return StageCut(layer, width, mask, mask is None, torch.tensor([[lost]]))


def test_join() -> None:
    ones = torch.tensor([[V, V]])
    assert join(None, 3, None, 2) is None
    assert join(None, 3, ones, 2).tolist() == [[V] * 5]
    assert join(torch.tensor([[1, 0, 1]]), 3, None, 2).tolist() == [[V, o, V, V, V]]
    assert join(torch.tensor([[o, V, V]]), 3, torch.tensor([[V, o]]), 2).tolist() == [[o, V, V, V, o]]


def test_what_each_layer_holds() -> None:
    prefix = CachedPrefix(20, (cut(0, 12, 8), cut(2, 9, 3), cut(4, 7, 5)))
    assert [prefix.held(layer) for layer in range(6)] == [12, 12, 9, 9, 7, 7]
    assert CachedPrefix(20, (cut(2, 9, 3),)).held(1) == 20
    assert prefix.at_layer(1) is None
    assert prefix.at_input() is prefix.cuts[0]
    device = torch.device("cpu")
    assert prefix.before(3, device) is prefix.cuts[1]
    inside = prefix.before(1, device)
    assert (inside.width, int(inside.num_dropped_B1)) == (12, 0), (
        "positions inside count from the language model's input"
    )
    assert (CachedPrefix(20).before(5, device).width, CachedPrefix(20).before(5, device).whole) == (20, True)


def test_a_request_grows_by_its_answer() -> None:
    prefix = CachedPrefix(6, (cut(2, 3, 3, [o, V, V]),), torch.tensor([[o, V, V, V, V, V]]))
    grown = prefix.grown(2, torch.tensor([[V, o]]))
    assert grown.length == 8
    assert grown.cuts[0].width == 5
    assert grown.cuts[0].padding_BN.tolist() == [[o, V, V, V, o]]
    assert grown.mask_BP.tolist() == [[o, V, V, V, V, V, V, o]]
    assert prefix.cuts[0].width == 3, "the request before it stays"


def test_a_request_without_its_last_words() -> None:
    prefix = CachedPrefix(6, (cut(2, 4, 2, [o, V, V, o]), cut(4, 3, 3)), torch.tensor([[o, V, V, V, V, o]]))
    shorter = prefix.cropped(1)
    assert shorter.length == 5
    assert [c.width for c in shorter.cuts] == [3, 2]
    assert shorter.cuts[0].padding_BN.tolist() == [[o, V, V]]
    assert shorter.cuts[1].padding_BN is None
    assert shorter.mask_BP.tolist() == [[o, V, V, V, V]]
    assert prefix.grown(1, torch.tensor([[V]])).cropped(1).cuts[0].width == 4


def test_a_second_turn_stands_behind_the_first() -> None:
    first, second = cut(2, 5, 4, [o, V, V, V, V]), cut(2, 3, 6)
    both = second.after(first)
    assert (both.layer, both.width, int(both.num_dropped_B1), both.whole) == (2, 8, 10, False)
    assert both.padding_BN.tolist() == [[o, *[V] * 7]]


def test_a_call_knows_whether_it_brings_images() -> None:
    assert not Call(SETTINGS).is_prefill
    assert Call(SETTINGS, places={"image": torch.ones(1, 1, dtype=torch.bool)}).is_prefill
    call, made = Call(SETTINGS), []
    for _ in range(2):
        assert call.once("mask", lambda: made.append(1) or "mask") == "mask"
    assert made == [1]


# ------------------------------------------------------------------------------------------------- on a real model


@pytest.mark.parametrize("stages", [[Stage("uniform", 0, keep_tokens=9)], [Stage("uniform", 2, keep_tokens=9)]])
def test_a_prompt_leaves_its_length_on_the_cache(model: Any, stages: list[Stage]) -> None:
    inputs = batch([(5, 1, 7)])
    length = inputs["input_ids"].shape[1]
    attach(model, PruningPlan(stages))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert cache.get_seq_length() == length
    assert cache.layers[-1].get_seq_length() == length - TOKENS + 9
    prefix = recall(cache, 1)
    assert prefix.length == length
    assert [prefix.held(layer) for layer in range(len(cache.layers))] == [
        layer.get_seq_length() for layer in cache.layers
    ]


def test_a_cache_that_served_a_prompt_serves_another(model: Any) -> None:
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=9)]))
    inputs, text = batch([(5, 1, 7)]), batch([(5, 0, 7)], seed=3)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    cache.crop(-cache.layers[0].get_seq_length())
    assert torch.equal(generate(model, text, past_key_values=cache).sequences, generate(model, text).sequences)


def test_continuous_batching_of_text_equals_generate(model: Any) -> None:
    """It takes ids only, so there is nothing to prune, and its paged cache is no cache of ours."""
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=9), Stage("uniform", 2, keep_tokens=5)]))
    prompts = [batch([(n, 0, 3)], seed=n)["input_ids"] for n in (7, 2)]
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    found = model.generate_batch(
        [ids[0].tolist() for ids in prompts], options, continuous_batching_config=room, warmup=False
    )
    for made, ids in zip(found.values(), prompts, strict=True):
        alone = generate(model, {"input_ids": ids}, new=4, suppress_tokens=None)
        assert made.generated_tokens == alone.sequences[0, ids.shape[1] :].tolist()


def test_words_after_the_pictures_may_be_taken_back(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    length = inputs["input_ids"].shape[1]
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=9), Stage("uniform", 2, keep_tokens=5)]))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        whole = model(**inputs).logits
        cache.crop(-3)
        again = model(input_ids=inputs["input_ids"][:, -3:], past_key_values=cache)
    assert (again.logits - whole[:, -3:]).abs().max() < 1e-5
    assert again.past_key_values.get_seq_length() == length


def test_taking_pictures_back_raises_at_the_next_call(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=9)]))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-10)
        with pytest.raises(ValueError, match="Cannot continue here"):
            model(input_ids=torch.tensor([[11, 12]]), past_key_values=cache)


def test_a_shortened_cache_is_freed_with_its_last_reference() -> None:
    """Keys and values of a finished request must not wait for the garbage collector."""
    cache = filled()
    remember(cache, SHORT)
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_stands_for_the_same_conversation(duplicate: Any) -> None:
    cache = filled()
    remember(cache, SHORT)
    other = duplicate(cache)
    assert isinstance(other, DynamicCache)
    assert other.get_seq_length() == 12
    assert held_columns(other) == 5
    forget(other)
    assert type(other) is DynamicCache
    assert cache.get_seq_length() == 12
