"""In every family: what pruners see of the layer before is what the model's own eager attention computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import pytest
import torch
from looks import LAYER_WORDS, Looks, plan_of, seen, tokens_of
from subjects import Subject
from support import answer_labels, is_placeholder
from torch import Tensor

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import Stage
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind
from tpcompress.pruners import TokenView
from tpcompress.pruners.base import BETWEEN, INSTRUCTION, SYSTEM

ANSWER = 3
"""Words of the answer at the end of each sample."""


@contextmanager
def eager(*models: Any) -> Iterator[None]:
    """Models with eager attention, which returns its weights."""
    before = [model.config.get_text_config()._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


def good_layers(subject: Subject) -> list[int]:
    """Layers behind attention at which a stage may act; at least one of each kind of attention is among them."""
    config = subject.config.get_text_config()
    return [i for i in resolve(subject.base).stage_layers if i and layer_kind(config, i - 1) not in RECURRENT]


def ends(subject: Subject) -> list[int]:
    """The first and the last of these layers, and the first behind each kind of attention."""
    layers, config = good_layers(subject), subject.config.get_text_config()
    kinds = {layer_kind(config, i - 1): i for i in reversed(layers)}
    return sorted({layers[0], layers[-1], *kinds.values()})


def weights_of(out: Any, subject: Subject, layer: int) -> Tensor:
    """The weights of a layer: layers without attention return none."""
    config = subject.config.get_text_config()
    return out.attentions[sum(layer_kind(config, i) not in RECURRENT for i in range(layer))]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5)


def samples(subject: Subject) -> list[Any]:
    """One image, all kinds, none."""
    return [(5, 1, 7), (6, subject.kinds, 6), (4, 0, 9)]


def test_rows_and_keys_are_those_of_the_layer(subject: Subject) -> None:
    with eager(subject.model, subject.base):
        for layer, side in zip(ends(subject), cycle(["left", "right"]), strict=False):
            inputs = subject.batch(*samples(subject), side=side)
            more = {"labels": answer_labels(inputs, ANSWER), "output_attentions": True}
            stage, out = seen(subject.model, plan_of(*LAYER_WORDS, layer=layer), inputs, **more)
            with torch.no_grad():
                full = weights_of(subject.base(**inputs, **more), subject, layer - 1)
            assert close(weights_of(out, subject, layer - 1), full)
            check_rows(stage.view, full, tokens_of(stage, inputs, subject.base), inputs)
            check_keys(subject, stage.view, tokens_of(stage, inputs, subject.base), inputs, layer)
            detach(subject.model)


def check_rows(view: TokenView, full: Tensor, rows: list[tuple[int, list[int]]], inputs: dict[str, Any]) -> None:
    """Every row of attention against the model's, and the words that they belong to."""
    differs = False
    for r, (b, places) in enumerate(rows):
        V = len(places)
        real = inputs["attention_mask"][b].nonzero()[:, 0].tolist()
        last = real[-1] - ANSWER
        assert close(view.attention_BHV[r, :, :V], full[b][:, last, places])
        differs |= not close(view.attention_BHV[r, :, :V], full[b][:, last - 1, places])
        assert close(view.attention_last_vision_BHV[r, :, :V], full[b][:, places[-1], places])
        ids = inputs["input_ids"][b]
        words = [s for s in real if not is_placeholder(ids[s]) and s <= last]
        roles = [SYSTEM if s < places[0] else INSTRUCTION if s > places[-1] else BETWEEN for s in words]
        Q = len(words)
        assert view.prompt_column_BQ[r, :Q].tolist() == words
        assert view.prompt_role_BQ[r].tolist() == roles + [0] * (view.prompt_role_BQ.shape[1] - Q)
        assert close(view.attention_prompt_BHQV[r, :, :Q, :V], full[b][:, words][:, :, places])
        assert not view.attention_prompt_BHQV[r, :, Q:].any(), "no row of an answer, of padding or of another sample"
        role_S = torch.zeros(len(ids), dtype=torch.int8)
        role_S[words] = torch.tensor(roles, dtype=torch.int8)
        assert torch.equal(view.text_role_BS[r], role_S)
        assert torch.equal(view.text_valid_BS[r], role_S == INSTRUCTION)
    assert differs, "control: the row of another word is another one"


def check_keys(
    subject: Subject, view: TokenView, rows: list[tuple[int, list[int]]], inputs: dict[str, Any], layer: int
) -> None:
    """Keys and values against what the layer writes into a cache that forgets nothing."""
    kept: dict[str, Tensor] = {}
    index = resolve(subject.base).family.keys_of(subject.config, layer - 1)
    module = resolve(subject.base).layers[index].self_attn

    class Keeps:
        """A cache that hands back what it is given and remembers that of one layer."""

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
            kept["keys"], kept["values"] = keys, values
            return keys, values

    def give(_: Any, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"past_key_values": Keeps()}

    handle = module.register_forward_pre_hook(give, with_kwargs=True)
    with torch.no_grad():
        subject.base(**inputs, use_cache=False)
    handle.remove()
    keys_BSD, values_BSD = (kept[name].transpose(1, 2).flatten(2) for name in ("keys", "values"))
    for r, (b, places) in enumerate(rows):
        assert close(view.keys_BVD[r, : len(places)], keys_BSD[b, places])
        assert torch.allclose(view.text_keys_BSD[r], keys_BSD[b], atol=1e-5)
        assert close(view.values_BVD[r, : len(places)], values_BSD[b, places])
        assert torch.allclose(view.text_values_BSD[r], values_BSD[b], atol=1e-5)
    assert not torch.allclose(view.text_keys_BSD[0], keys_BSD[0].roll(1, 0), atol=1e-2), "control: positions differ"


def test_the_kernel_makes_no_difference(subject: Subject) -> None:
    """Within what sdpa itself differs from eager attention in the layers before."""
    inputs, layer = subject.batch(*samples(subject)), good_layers(subject)[-1]
    with eager(subject.model):
        expected = seen(subject.model, plan_of(*LAYER_WORDS, layer=layer), inputs)[0].view
    detach(subject.model)
    kernels = {m.config._attn_implementation for m in subject.model.modules() if hasattr(m, "q_proj")}
    view = seen(subject.model, plan_of(*LAYER_WORDS, layer=layer), inputs)[0].view
    for name in ("attention_BHV", "attention_prompt_BHQV", "attention_last_vision_BHV"):
        assert (getattr(view, name) - getattr(expected, name)).abs().max() < 1e-3
    assert {m.config._attn_implementation for m in subject.model.modules() if hasattr(m, "q_proj")} == kernels


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_behind_earlier_stages_the_shortened_layer_counts(subject: Subject, positions: str) -> None:
    layer = good_layers(subject)[-1]
    stages = [Stage("uniform", 0, keep_ratio=0.4), Stage(Looks(LAYER_WORDS), layer, keep_tokens=3)]
    inputs = subject.batch((5, 1, 7))
    with eager(subject.model):
        stage, out = seen(subject.model, subject.plan(stages, positions=positions), inputs, output_attentions=True)
    full, view = weights_of(out, subject, layer - 1), stage.view
    assert full.shape[-1] < inputs["input_ids"].shape[1], "control: something was cut"
    for r, count in enumerate(stage.vision_in):
        assert int(view.valid_BV[r].sum()) == count
        gap_VN = (full[0][:, -1, None] - view.attention_BHV[r, :, :count, None]).abs().amax(0)
        assert gap_VN.amin(1).max() < 1e-5, "every weight is that of some column"
        places = gap_VN.argmin(1)
        if len(places.unique()) == count:
            assert (places.diff() > 0).all(), "in the order of the sequence"
            assert close(view.attention_last_vision_BHV[r, :, :count], full[0][:, places[-1], places])


def test_the_layer_behind_and_the_input(subject: Subject) -> None:
    """What the last word would pay behind the stage, and everything as it entered the language model."""
    parts, config = resolve(subject.base), subject.config.get_text_config()
    layer = [i for i in parts.stage_layers if i and layer_kind(config, i) not in RECURRENT][-1]
    inputs, given = subject.batch(*samples(subject)), []
    more = {"labels": answer_labels(inputs, ANSWER), "output_attentions": True}
    handle = parts.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    looks, first = Stage(Looks(("attention_next", "input")), layer, keep_tokens=3), good_layers(subject)[0]
    with eager(subject.model, subject.base):
        stage, _ = seen(subject.model, plan_of("attention_next", "input", layer=layer), inputs, **more)
        detach(subject.model)
        with torch.no_grad():
            full = weights_of(subject.base(**inputs, **more), subject, layer)
        handle.remove()
        if first < layer:
            early = Stage("random", first, keep_tokens=9)
            cut, _ = seen(subject.model, subject.plan([early, looks]), inputs, **more)
            detach(subject.model)
            alone, out = seen(subject.model, subject.plan([early]), inputs, **more)
            shorter = weights_of(out, subject, layer)
    for r, (b, places) in enumerate(tokens_of(stage, inputs, subject.base)):
        last = int(inputs["attention_mask"][b].nonzero()[-1]) - ANSWER
        view, V = stage.view, len(places)
        assert close(view.attention_next_BHV[r, :, :V], full[b][:, last, places])
        words = [s for s in range(last + 1) if inputs["attention_mask"][b, s]]
        words = [s for s in words if not is_placeholder(inputs["input_ids"][b, s])]
        assert close(view.input_prompt_BQD[r, : len(words)], given[0][b, words])
        assert close(view.input_vision_BUD[r, :V], given[0][b, places])
        assert int(view.input_valid_BU[r].sum()) == V
        if first < layer:
            view, kept = cut.view, torch.tensor(places)[alone.retained_RV[r, :V]].tolist()
            columns = shorter.shape[-1] - inputs["input_ids"].shape[1] + sum(alone.retained_RV[r, :V].tolist())
            assert columns <= len(kept), "control: the layer behind was shortened"
            weights = shorter[b][:, -1 - ANSWER]
            for v in range(len(kept)):
                assert (weights - view.attention_next_BHV[r, :, v][:, None]).abs().amax(0).min() < 1e-5
            assert close(view.input_vision_BUD[r, :V], given[0][b, places]), "early stages hide nothing here"
            assert close(view.input_prompt_BQD[r, : len(words)], given[0][b, words])


def later_positions(subject: Subject, *turns: dict[str, Any]) -> dict[str, Any]:
    """Positions of the second turn, where the model would not count on by itself."""
    if subject.family.positions != "mrope":
        return {}
    along = {k: int(v.ndim == 2 and v.shape[0] == 1 and not k.endswith("thw")) for k, v in turns[0].items()}
    together = {k: torch.cat([turn[k] for turn in turns], along[k]) for k in turns[0]}
    given: list[Tensor] = []
    handle = resolve(subject.base).language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        subject.base(**together)
    handle.remove()
    return {"position_ids": given[0][..., turns[0]["input_ids"].shape[1] :]}


@pytest.mark.parametrize("early", [[], [Stage("uniform", 0, keep_ratio=0.5)]], ids=["alone", "behind stage 0"])
def test_in_a_conversation_the_softmax_counts_what_the_cache_holds(subject: Subject, early: list[Stage]) -> None:
    layer, config = good_layers(subject)[-1], subject.config.get_text_config()
    first, second = (subject.batch((5, 1, 7), seed=seed) for seed in (1, 2))
    del first["attention_mask"], second["attention_mask"]
    more = second | later_positions(subject, first, second)
    with eager(subject.model), torch.no_grad():
        looks = Stage(Looks(("attention", "attention_last_vision")), layer, keep_tokens=3)
        attach(subject.model, subject.plan([*early, looks]))
        cache = subject.model(**first, use_cache=True).past_key_values
        if layer_kind(config, layer - 1) == "sliding_attention":
            with pytest.raises(ValueError, match="forgets what a window passed; set layer"):
                subject.model(**more, past_key_values=cache)
            return
        with record(subject.model) as trace:
            out = subject.model(**more, past_key_values=cache, output_attentions=True)
    stage, full = trace.stages[-1], weights_of(out, subject, layer - 1)
    S = second["input_ids"].shape[1] - sum(stage.total) + sum(stage.vision_in)
    assert full.shape[-1] > S, "control: the layer sees the conversation before"
    assert full[0, :, -1, :-S].sum() > 0.05, "control: it takes its part"
    own = full[0][..., -S:]
    if early:
        gap_VN = (own[:, -1, None] - stage.view.attention_BHV[0, :, : stage.vision_in[0], None]).abs().amax(0)
        assert gap_VN.amin(1).max() < 1e-5, "every weight is that of some column"
        return
    places = tokens_of(stage, second, subject.base)[0][1]
    assert close(stage.view.attention_BHV[0], own[:, -1, places])
    assert close(stage.view.attention_last_vision_BHV[0], own[:, places[-1], places])
