"""Generation in every class: with any cache, by beams, sampling, assistance or by hand, the tokens are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import tolerance
from structure import plans
from subjects import Subject
from support import alone, generate, logit_gap, new_tokens
from ways import ways

from tpcompress.insertion.attach import attach, detach, mode, record
from tpcompress.insertion.plan import Stage

PLANS = {
    "stage 0": [Stage("uniform", 0, keep_ratio=0.5)],
    "layer 2": [Stage("divprune", 2, keep_ratio=0.25)],
    "three": [
        Stage("pool", 0, keep_ratio=0.6),
        Stage("divprune", 2, keep_ratio=0.3),
        Stage("random", 4, keep_ratio=0.1),
    ],
}


def ragged(subject: Subject) -> list[Any]:
    return [(5, 1, 7), (3, subject.kinds, 8), (4, 0, 9)]


_without_cache: dict[str, bool] = {}


def base_without_cache(subject: Subject, inputs: dict[str, Any], **options: Any) -> bool:
    """Whether the unpruned model itself generates the same with and without a cache; every plan asks once."""
    key = f"{subject.case} {options} {inputs['input_ids'].tolist()}"
    if key not in _without_cache:
        _without_cache[key] = _base_without_cache(subject, inputs, **options)
    return _without_cache[key]


def _base_without_cache(subject: Subject, inputs: dict[str, Any], **options: Any) -> bool:
    runs = []
    for cache in (True, False):
        torch.manual_seed(11)
        try:
            runs.append(generate(subject.base, inputs, new=3, use_cache=cache, **options).sequences)
        except (ValueError, IndexError):
            return False
    return torch.equal(*runs)


def agree(subject: Subject, a: Any, b: Any) -> None:
    """Same tokens and logits."""
    assert logit_gap(a, b) < tolerance(subject.model)
    assert torch.equal(a.sequences, b.sequences)


@plans(PLANS, "stage 0, original", "layer 2, compact", "three, compact", every_family=["layer 2, compact"])
@ways("drop prefill", "drop decoding", "mask prefill", "mask decoding", "drop static decoding")
def test_cached_equals_recomputed(subject: Subject, name: str, positions: str) -> None:
    inputs = subject.batch(*ragged(subject))
    plain = generate(subject.model, inputs, new=4)
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    cached = generate(subject.model, inputs, new=4)
    if base_without_cache(subject, inputs):
        agree(subject, cached, generate(subject.model, inputs, new=4, use_cache=False))
    agree(subject, cached, generate(subject.model, inputs, new=4, cache_implementation="static", disable_compile=True))
    if subject.hides:
        with mode(subject.model, "mask"):
            agree(subject, cached, generate(subject.model, inputs, new=4))
    assert logit_gap(cached, plain) > 0.05, "control: pruning must change the logits"


@plans(PLANS, "three, original")
@ways("drop decoding")
def test_batch_equals_alone(subject: Subject, name: str, positions: str) -> None:
    samples = ragged(subject)
    inputs = subject.batch(*samples)
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    together = generate(subject.model, inputs, new=4)
    for b in range(len(samples)):
        single = generate(subject.model, alone(inputs, samples, b, subject.case[0], subject.config), new=4)
        gap = max((x[0] - y[b]).abs().max().item() for x, y in zip(single.logits, together.logits, strict=True))
        assert gap < tolerance(subject.model)
        assert torch.equal(new_tokens(single, 4)[0], new_tokens(together, 4)[b])


@plans(PLANS, "three, compact")
def test_beams_and_sampling_equal_recomputation(subject: Subject, name: str, positions: str) -> None:
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    inputs = subject.batch(*ragged(subject))
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5},
    ):
        if not base_without_cache(subject, inputs, **options):
            continue  # GLM-4V's beams and ERNIE's expert types do not survive a missing cache
        runs = []
        for cache in (True, False):
            torch.manual_seed(11)
            runs.append(generate(subject.model, inputs, new=3, use_cache=cache, **options))
        assert torch.equal(runs[0].sequences, runs[1].sequences), options
        assert len(runs[0].sequences) == 2 * len(ragged(subject))


def test_encoded_images_are_pruned_alike(subject: Subject) -> None:
    """Transformers encodes images before the prefill and passes features: sizes of images are gone by then."""
    inputs, seen = subject.batch(*ragged(subject)), []
    attach(subject.model, subject.plan(PLANS["three"]))
    hook = subject.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(bool(kwargs.get("mm_encoder_outputs"))), with_kwargs=True
    )
    with record(subject.model) as trace:
        generate(subject.model, inputs, new=2)
    hook.remove()
    assert seen == [True, False]
    with record(subject.model) as direct, torch.no_grad():
        subject.model(**inputs)
    assert [s.layouts for s in trace.stages] == [s.layouts for s in direct.stages]
    for a, b in zip(trace.stages, direct.stages, strict=True):
        assert torch.equal(a.retained_RV, b.retained_RV)


@plans(PLANS, "three, original")
@ways("drop decoding")
def test_assisted_decoding_equals_greedy(subject: Subject, name: str, positions: str) -> None:
    """Rejected candidates are cropped from layers of unequal length."""
    inputs = subject.batch((5, 1, 7))
    words = torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], words], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs |= subject.family.tiny.arguments(subject.config, inputs["input_ids"])
    try:
        generate(subject.base, inputs, new=6, prompt_lookup_num_tokens=3)
    except (ValueError, IndexError) as error:
        pytest.skip(f"transformers: {error}")
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    greedy = generate(subject.model, inputs, new=6)
    calls = []
    hook = subject.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assisted = generate(subject.model, inputs, new=6, prompt_lookup_num_tokens=3)
    finally:
        hook.remove()
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert max(calls[0] - inputs["input_ids"].shape[1], *calls[1:]) > 1, "control: candidates were looked at"


def test_chunked_prefill_through_an_image_is_refused(subject: Subject) -> None:
    if "videos" in subject.case[1]:
        pytest.skip("transformers finds no GLM-4V video by its token and leaves it out of every chunk")
    attach(subject.model, subject.plan(PLANS["stage 0"]))
    with pytest.raises(ValueError, match="chunked prefill"):
        generate(subject.model, subject.batch((5, 1, 7)), prefill_chunk_size=20)


@plans(PLANS, "stage 0, compact", "three, original")
@ways("drop decoding")
def test_decoding_by_hand(subject: Subject, name: str, positions: str) -> None:
    """Without position ids, as a caller's own loop does; two requests in turns, each with its own cache."""
    requests = [subject.batch((5, 1, 7)), subject.batch((9, subject.kinds, 4), seed=2)]
    if subject.family.positions == "mrope":  # transformers reads a 2-D mask of the whole length as that of the step
        for inputs in requests:
            del inputs["attention_mask"]
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    expected = [generate(subject.model, inputs, new=3) for inputs in requests]
    with torch.no_grad():
        outs = [subject.model(**inputs, use_cache=True) for inputs in requests]
        masks = [inputs.get("attention_mask") for inputs in requests]
        for step in range(3):
            for i, out in enumerate(outs):
                assert (out.logits[:, -1] - expected[i].logits[step]).abs().max() < tolerance(subject.model)
                token = expected[i].sequences[:, step - 3][:, None]
                if masks[i] is not None:
                    masks[i] = torch.cat([masks[i], masks[i].new_ones(1, 1)], 1)
                outs[i] = subject.model(input_ids=token, past_key_values=out.past_key_values, attention_mask=masks[i])


def test_lengths_of_every_layer(subject: Subject) -> None:
    inputs = subject.batch((5, 1, 7))
    attach(subject.model, subject.plan([Stage("uniform", 0, keep_ratio=0.5), Stage("random", 2, keep_ratio=0.2)]))
    with record(subject.model) as trace, torch.no_grad():
        cache = subject.model(**inputs, use_cache=True).past_key_values
    assert cache.get_seq_length() == inputs["input_ids"].shape[1], "a cache stands for the whole conversation"
    window = getattr(subject.config.get_text_config(), "sliding_window", None) or 10**9
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            stage = [s for s in trace.stages if s.layer <= i][-1]
            held = layer.keys.shape[2]
            assert held == stage.sequence_out or (held == window - 1 < stage.sequence_out)
    detach(subject.model)
