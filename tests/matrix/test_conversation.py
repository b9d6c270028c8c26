"""Continuing from a returned cache equals reading the whole conversation at once, or raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import tolerance
from structure import plans
from subjects import Subject
from support import generate, logit_gap, new_tokens
from transformers import DynamicCache, StaticCache
from ways import ways

from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import Stage

PLANS = {
    "stage 0": [Stage("uniform", 0, keep_ratio=0.5)],
    "layer 2": [Stage("divprune", 2, keep_ratio=0.25)],
    "three": [
        Stage("divprune", 0, keep_ratio=0.6),
        Stage("uniform", 2, keep_ratio=0.3),
        Stage("divprune", 4, keep_ratio=0.1),
    ],
}


def whole(subject: Subject, *parts: dict[str, Any]) -> dict[str, Any]:
    """Several prompts as one: ids and images one after the other."""
    inputs = {"input_ids": torch.cat([p["input_ids"] for p in parts], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs |= subject.family.tiny.arguments(subject.config, inputs["input_ids"])
    for name in {k for p in parts for k in p} - set(inputs):
        given = [p[name] for p in parts if name in p]
        # One row of images per sample in some families, one entry per image in others.
        dim = 1 if subject.family.splits_tiles else 0
        most = [max(x.shape[i] for x in given) for i in range(given[0].ndim)]
        room = [[n for i in reversed(range(dim + 1, x.ndim)) for n in (0, most[i] - x.shape[i])] for x in given]
        inputs[name] = torch.cat([torch.nn.functional.pad(x, pads) for x, pads in zip(given, room, strict=True)], dim)
    return inputs


def reads_ahead(subject: Subject, inputs: dict[str, Any]) -> bool:
    """A prefix-LM reads its whole prompt both ways: there a second turn is something else than a longer prompt."""
    blocks = subject.family.blocks
    ids = None if blocks is None else blocks.ids(subject.config, inputs)
    return ids is not None and bool((ids[:, 0] >= 0).any())


@plans(PLANS, "stage 0, original", "layer 2, compact", "three, compact")
@ways("drop prefill", "drop continuing", "drop decoding")
def test_text_continues(subject: Subject, name: str, positions: str) -> None:
    """A second question about the same image, through `generate`."""
    inputs = subject.batch((5, subject.kinds, 7))
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    first = generate(subject.model, inputs, new=3)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    arguments = subject.family.tiny.arguments(subject.config, ids)
    pictures = {k: v for k, v in inputs.items() if k not in again and k not in arguments}
    fresh = generate(subject.model, again | arguments | pictures, new=3)
    out = generate(subject.model, again, new=3, past_key_values=first.past_key_values)
    assert logit_gap(out, fresh) < tolerance(subject.model)
    assert torch.equal(out.sequences, fresh.sequences)


@plans(PLANS, "stage 0, original", "layer 2, compact", "three, compact")
def test_new_picture_continues(subject: Subject, name: str, positions: str) -> None:
    """An image in the second turn is pruned, too, and everything is as if both had come at once."""
    turns = [subject.batch((5, subject.kinds, 7)), subject.batch((3, 1, 4), seed=5)]
    for turn in turns:
        del turn["attention_mask"]
    together = whole(subject, *turns)
    if reads_ahead(subject, together):
        pytest.skip("a prefix-LM")
    length = turns[0]["input_ids"].shape[1]
    attach(subject.model, subject.plan(PLANS[name], positions=positions))
    core, seen = subject.model.model, []
    hook = (getattr(core, "language_model", None) or core.text_model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True, prepend=True
    )
    with torch.no_grad(), record(subject.model) as one:
        expected = subject.model(**together, use_cache=True)
    hook.remove()
    second = dict(turns[1])
    if subject.family.positions == "mrope":  # a caller must say where a later image is; transformers cannot know
        second["position_ids"] = seen[0][..., length:]
    if subject.family.blocks is not None:  # these are read by position, from the start of the conversation
        second |= subject.family.tiny.arguments(subject.config, together["input_ids"])
    with torch.no_grad(), record(subject.model) as two:
        cache = subject.model(**turns[0], use_cache=True).past_key_values
        out = subject.model(**second, past_key_values=cache, attention_mask=together["attention_mask"])
    assert len(two.stages) == 2 * len(one.stages)
    assert [sum(s.vision_out) for s in one.stages] == [
        sum(a.vision_out) + sum(b.vision_out)
        for a, b in zip(two.stages[: len(one.stages)], two.stages[len(one.stages) :], strict=True)
    ]
    width = out.logits.shape[1]
    assert (out.logits - expected.logits[:, -width:]).abs().max() < tolerance(subject.model)
    # and on from there: decoding reads both cuts
    token, mask = torch.tensor([[17]]), torch.ones(1, length + second["input_ids"].shape[1] + 1, dtype=torch.long)
    more = {"attention_mask": None if subject.family.positions == "mrope" else mask}
    if subject.family.positions == "mrope":
        more["position_ids"] = seen[0][..., -1:] + 1
    with torch.no_grad():
        a = subject.model(input_ids=token, past_key_values=out.past_key_values, **more).logits
        b = subject.model(input_ids=token, past_key_values=expected.past_key_values, **more).logits
    assert (a - b).abs().max() < tolerance(subject.model)


def test_words_before_the_first_picture(subject: Subject) -> None:
    """A conversation that starts without an image has nothing of ours on its cache when one comes."""
    turns = [subject.batch((9, 0, 0)), subject.batch((3, 1, 4), seed=5)]
    for turn in turns:
        del turn["attention_mask"]
    together = whole(subject, *turns)
    if reads_ahead(subject, together):
        pytest.skip("a prefix-LM")
    if subject.family.positions == "mrope":
        pytest.skip("positions of a later picture come from the caller: covered by the test above")
    second = dict(turns[1])
    if subject.family.blocks is not None:
        second |= subject.family.tiny.arguments(subject.config, together["input_ids"])
    for positions in ("original", "compact"):
        attach(subject.model, subject.plan(PLANS["three"], positions=positions))
        with torch.no_grad():
            expected = subject.model(**together).logits
            cache = subject.model(input_ids=turns[0]["input_ids"], use_cache=True).past_key_values
            out = subject.model(**second, past_key_values=cache, attention_mask=together["attention_mask"]).logits
        assert (out - expected[:, -out.shape[1] :]).abs().max() < tolerance(subject.model)
        detach(subject.model)


def test_batches_continue(subject: Subject) -> None:
    """Samples of unequal length, padded left, with other images: fillers of the first turn stay hidden."""
    inputs = subject.batch((5, 1, 7), (3, subject.kinds, 8))
    for name in PLANS:
        attach(subject.model, subject.plan(PLANS[name]))
        first = generate(subject.model, inputs, new=3)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13], [14, 15, 16]])], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
        again = {"input_ids": ids, "attention_mask": mask}
        arguments = subject.family.tiny.arguments(subject.config, ids)
        pictures = {k: v for k, v in inputs.items() if k not in again and k not in arguments}
        fresh = generate(subject.model, again | arguments | pictures, new=2)
        out = generate(subject.model, again, new=2, past_key_values=first.past_key_values)
        assert logit_gap(out, fresh) < tolerance(subject.model)
        assert torch.equal(new_tokens(out, 2), new_tokens(fresh, 2))
        detach(subject.model)


def test_a_cache_cropped_into_the_prompt_is_refused(subject: Subject) -> None:
    inputs = subject.batch((5, 1, 7))
    del inputs["attention_mask"]
    for name in PLANS:
        attach(subject.model, subject.plan(PLANS[name]))
        with torch.no_grad():
            cache = subject.model(**inputs, use_cache=True).past_key_values
            try:
                cache.crop(-15)  # nine words stand behind the image
            except (RuntimeError, ValueError, NotImplementedError):
                pytest.skip("transformers cannot crop this cache")
            with pytest.raises(ValueError, match="Cannot continue here"):
                subject.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        detach(subject.model)


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_used_again_forgets_the_earlier_request(subject: Subject, static: bool) -> None:
    config = subject.config.get_text_config()
    attach(subject.model, subject.plan(PLANS["three"]))
    cache = StaticCache(config=config, max_cache_len=200) if static else DynamicCache(config=config)
    for sample in ((5, 1, 7), (9, 0, 4), (2, 1, 3)):
        inputs = subject.batch(sample, seed=3)
        if static and reads_ahead(subject, inputs):
            continue  # PaliGemma takes a static cache that was reset for one in use, and reads the prompt causally
        expected = generate(subject.model, inputs, new=3)
        cache.reset()
        out = generate(subject.model, inputs, new=3, past_key_values=cache)
        assert torch.equal(out.sequences, expected.sequences)
        assert logit_gap(out, expected) < tolerance(subject.model)
