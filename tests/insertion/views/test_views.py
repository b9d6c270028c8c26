"""What pruners are shown is what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from looks import LAYER_WORDS, Looks
from no_sync import NoSync
from support import PLACEHOLDER, TOKENS, answer_labels, batch, tiny_model
from transformers import StaticCache

from tpcompress.insertion import stage
from tpcompress.insertion.attach import attach, detach, mode, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.views.build import build_view
from tpcompress.pruners.base import SYSTEM

SAMPLES = [(5, 1, 7), (3, 2, 8), (4, 0, 9)]


def rows(inputs: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """(sample, positions) of each image."""
    found = []
    for b, ids in enumerate(inputs["input_ids"]):
        places = (ids == PLACEHOLDER).nonzero().flatten().tolist()
        found += [(b, places[i : i + TOKENS]) for i in range(0, len(places), TOKENS)]
    return found


def view_of(model: Any, plan: PruningPlan, inputs: dict[str, Any], **more: Any) -> Any:
    attach(model, plan)
    with record(model) as trace, torch.no_grad():
        model(**inputs, **more)
    return trace.stages[-1].view


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [1, 2, 5])
def test_attention_equals_eager_attention(eager_model: Any, layer: int, side: str) -> None:
    inputs = batch(SAMPLES, side)
    with torch.no_grad():
        full = eager_model(**inputs, output_attentions=True).attentions[layer - 1]
    view = view_of(eager_model, PruningPlan([Stage("fastv", layer, keep_tokens=9)]), inputs)
    for r, (b, places) in enumerate(rows(inputs)):
        last = int(inputs["attention_mask"][b].nonzero()[-1])
        assert torch.allclose(view.attention_BHV[r], full[b][:, last, places], atol=1e-6)


def test_attention_is_the_same_under_sdpa(model: Any, eager_model: Any) -> None:
    inputs, plan = batch(SAMPLES), PruningPlan([Stage("fastv", 2, keep_tokens=9)])
    assert torch.allclose(
        view_of(model, plan, inputs).attention_BHV, view_of(eager_model, plan, inputs).attention_BHV, atol=1e-6
    )


def test_attention_reads_the_last_prompt_token_in_training(eager_model: Any) -> None:
    inputs = batch(SAMPLES)
    with torch.no_grad():
        full = eager_model(**inputs, output_attentions=True).attentions[1]
    view = view_of(
        eager_model, PruningPlan([Stage("fastv", 2, keep_tokens=9)]), inputs, labels=answer_labels(inputs, words=4)
    )
    for r, (b, places) in enumerate(rows(inputs)):
        assert torch.allclose(view.attention_BHV[r], full[b][:, -5, places], atol=1e-6)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_attention_after_an_earlier_stage(eager_model: Any, positions: str) -> None:
    """The layer before is itself shortened: its own attention weights are what counts."""
    inputs = batch([(5, 1, 7)])
    plan = PruningPlan(
        [Stage("uniform", 0, keep_tokens=30), Stage("random", 2, keep_tokens=20), Stage("fastv", 4, keep_tokens=5)],
        positions=positions,
    )
    attach(eager_model, plan)
    with record(eager_model) as trace, torch.no_grad():
        weights = eager_model(**inputs, output_attentions=True).attentions[3]
    view = trace.stages[2].view
    assert weights.shape[-1] == inputs["input_ids"].shape[1] - TOKENS + 20
    assert torch.allclose(view.attention_BHV[0], weights[0][:, -1, 5:25], atol=1e-6)


@pytest.mark.parametrize("layer", [1, 3])
def test_keys_equal_the_cache(model: Any, base: Any, layer: int) -> None:
    inputs = batch(SAMPLES)
    with torch.no_grad():
        keys = base(**inputs, use_cache=True).past_key_values.layers[layer - 1].keys
    keys = keys.transpose(1, 2).flatten(2)
    view = view_of(model, PruningPlan([Stage("dart", layer, keep_tokens=9)]), inputs)
    for r, (b, places) in enumerate(rows(inputs)):
        assert torch.allclose(view.keys_BVD[r], keys[b, places], atol=1e-6)
        assert torch.allclose(view.text_keys_BSD[r], keys[b], atol=1e-6)


def test_hidden_states_are_the_input_of_the_layer(model: Any, base: Any) -> None:
    inputs = batch(SAMPLES)
    with torch.no_grad():
        states = base(**inputs, output_hidden_states=True).hidden_states
    for layer in (1, 4):
        view = view_of(model, PruningPlan([Stage("dart", layer, keep_tokens=9)]), inputs)
        for r, (b, places) in enumerate(rows(inputs)):
            assert torch.allclose(view.vision_BVD[r], states[layer][b, places], atol=1e-5)
            assert torch.allclose(view.text_BSD[r], states[layer][b], atol=1e-5)
        detach(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_the_question_and_nothing_else(model: Any, side: str) -> None:
    inputs = batch(SAMPLES, side)
    plan = PruningPlan([Stage("uniform", 0, keep_tokens=20), Stage("dart", 3, keep_tokens=9)])
    view = view_of(model, plan, inputs, labels=answer_labels(inputs, words=4))
    # The last 4 words are the answer. After the only image 2 + 7 - 4 words; after two images 2 + 2 + 8 - 4, 2 + 8 - 4.
    assert view.text_valid_BS.sum(1).tolist() == [5, 8, 6]
    width = view.text_valid_BS.shape[1]
    assert not view.text_valid_BS[:, -4:].any()
    assert view.text_valid_BS[0].nonzero().flatten().tolist() == list(range(width - 9, width - 4))


def test_image_at_the_end_shows_all_text(model: Any) -> None:
    inputs = batch([(6, 1, 0)])
    inputs = {k: v[:, :-2] if k != "pixel_values" else v for k, v in inputs.items()}
    view = view_of(model, PruningPlan([Stage("dart", 2, keep_tokens=9)]), inputs)
    assert view.text_valid_BS.nonzero()[:, 1].tolist() == list(range(6))


def test_grid_survives_earlier_stages(model: Any) -> None:
    plan = PruningPlan([Stage("uniform", 0, keep_tokens=16), Stage("random", 2, keep_tokens=9)])
    view = view_of(model, plan, batch([(5, 1, 7)]))
    assert view.canvas == (8, 8)
    assert view.row_BV[0].unique().tolist() == [0, 2, 4, 6]
    assert view.col_BV[0].unique().tolist() == [0, 2, 4, 6]


def test_prompt_scope_stacks_the_grids(model: Any) -> None:
    plan = PruningPlan([Stage("random", 0, keep_tokens=50)], scope="prompt")
    view = view_of(model, plan, batch([(5, 1, 7), (3, 3, 4)]))
    assert view.canvas == (24, 8)
    assert view.valid_BV.sum(1).tolist() == [64, 192]
    assert view.row_BV[1].tolist() == [i // 8 for i in range(192)]


def test_only_what_is_needed_is_built(model: Any) -> None:
    view = view_of(model, PruningPlan([Stage("divprune", 2, keep_tokens=9)]), batch(SAMPLES))
    assert view.text_BSD is None
    assert view.keys_BVD is None
    assert view.attention_BHV is None


def test_attention_beside_a_static_cache(eager_model: Any, model: Any) -> None:
    """There the mask has room for tokens to come, and padding must be known from elsewhere."""
    inputs, plan = batch(SAMPLES), PruningPlan([Stage("fastv", 2, keep_tokens=9)])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=300)
    for one in (model, eager_model):
        expected = view_of(one, plan, inputs).attention_BHV
        detach(one)
        cache.reset()
        view = view_of(one, plan, inputs, past_key_values=cache)
        assert torch.allclose(view.attention_BHV, expected, atol=1e-6)


def test_no_view_makes_the_host_wait(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, built = batch([(5, 2, 7)]), []

    def guarded(*args: Any, **kwargs: Any) -> Any:
        with NoSync():
            built.append(build_view(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(stage, "build_view", guarded)
    words = (*LAYER_WORDS, "tower_cls", "tower_received", "tower_keys", "tower_features")
    stages = [Stage("uniform", 0, keep_tokens=30), Stage(Looks(words), 2, keep_tokens=9)]
    attach(model, PruningPlan(stages))
    for labels in (None, answer_labels(inputs)):
        with torch.no_grad():
            model(**inputs, labels=labels)
    assert [view.tower_keys_BLHVD is not None for view in built] == [False, True] * 2


def test_hidden_tokens_are_not_seen(eager_model: Any) -> None:
    """In mode `mask` dropped tokens stay in the sequence, but take no part in the softmax."""
    inputs = batch(SAMPLES)
    plan = PruningPlan([Stage("random", 0, keep_tokens=20), Stage(Looks(LAYER_WORDS), 2, keep_tokens=9)])
    attach(eager_model, plan)
    views = []
    for how in ("drop", "mask"):
        with mode(eager_model, how), record(eager_model) as trace, torch.no_grad():
            eager_model(**inputs)
        views.append(trace.stages[-1].view)
    a, b = views
    for name in ("attention_BHV", "attention_last_vision_BHV", "keys_BVD", "vision_BVD"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-5)
    rows = a.attention_prompt_BHQV.shape[2]
    assert torch.allclose(a.attention_prompt_BHQV, b.attention_prompt_BHQV[:, :, :rows], atol=1e-5)
    assert torch.equal(a.prompt_role_BQ, b.prompt_role_BQ[:, :rows])
    assert a.text_role_BS.shape[1] < b.text_role_BS.shape[1], "control: nothing was cut in mode mask"


def test_separators_are_no_words() -> None:
    """LLaVA-OneVision ends an image with a newline, which must not pass for the question."""
    model = tiny_model("llava_onevision")
    inputs = batch([(5, 1, 0)], family="llava_onevision", config=model.config)
    inputs = {k: v[:, :-2] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    view = view_of(model, PruningPlan([Stage(Looks(["text"]), 2, keep_tokens=9)]), inputs)
    assert view.text_role_BS[0].tolist() == [SYSTEM] * 5 + [0] * (inputs["input_ids"].shape[1] - 5)
    assert torch.equal(view.text_valid_BS, view.text_role_BS == SYSTEM), "a prompt without instruction shows all words"
