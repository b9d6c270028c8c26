"""A view that a model does not have is refused when the plan is attached, in one line that says what would work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from looks import Looks, plan_of
from support import batch, tiny_model

from tpcompress.families import list_families
from tpcompress.insertion import layer_probe
from tpcompress.insertion.attach import attach, detach, is_attached, mode
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import list_pruners

LFM2 = ("lfm2_vl", "lfm2")
CLIP, SIGLIP = ("llava", "clip_vision_model"), ("llava", "siglip_vision_model")

CASES = {
    "before the language model": (CLIP, ("keys",), {"layer": 0}, "keys of the layer before, which .*set layer >= 1"),
    "behind a convolution": (
        LFM2, ("keys",), {"layer": 1},
        "keys of the layer before, but layer 0 is of kind conv; set layer to one of 2, 4",
    ),
    "behind linear attention": (
        ("qwen3_5",), ("attention_prompt",), {"layer": 1},
        "attention_prompt of the layer before, but layer 0 is of kind linear_attention; set layer to one of 2, 5",
    ),
    "no class token": (SIGLIP, ("tower_cls",), {}, "tower_cls, .* has no class token; read tower_received instead"),
    "no class token in Qwen": (("qwen2_vl",), ("tower_cls",), {}, "tower_cls, .* has no class token"),
    "tower of another kind": (
        ("idefics3",), ("tower_keys",), {},
        "tower_keys, but the patches of idefics3 cannot be followed to its vision tokens; take one of .*llava",
    ),
    "layer that is not there": (
        CLIP, ("tower_keys",), {"layers": (-4, 1)},
        r"tower_keys of tower layers \(-4, 1\), but the tower has layers -3 to 2; name some of these",
    ),
    "no layer": (CLIP, ("tower_features",), {"layers": ()}, r"tower_features of tower layers \(\), but the tower has"),
    "joint space": (CLIP, ("joint",), {}, "CLIP's projections and text tower, but no llava checkpoint holds them"),
    "misspelt": (
        CLIP, ("atention",), {"layer": 2}, r"'atention', which is no view \(views: attention, .*values\); correct",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, ...], Any]:
    return {}


@pytest.fixture
def lend(models: dict[tuple[str, ...], Any]) -> Iterator[Any]:
    """Tiny models by family and arguments, detached afterwards."""

    def get(case: tuple[str, ...]) -> Any:
        if case not in models:
            variant = case[1:] or list_families()[case[0]].tiny.variants[0]
            models[case] = tiny_model(case[0], *variant)
        return models[case]

    yield get
    for model in models.values():
        if is_attached(model):
            detach(model)


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(lend: Any, name: str) -> None:
    case, words, where, message = CASES[name]
    model = lend(case)
    with pytest.raises(ValueError, match=f"^Pruner 'looks' needs {message}.* or use one of: [^\n]*$") as error:
        attach(model, plan_of(*words, **where))
    assert not is_attached(model)
    named = str(error.value).rsplit(": ", 1)[1].rstrip(".").split(", ")
    for pruner, cls in list_pruners().items():
        if cls.keeps_none:  # fits everywhere, and retains nothing: no advice
            assert pruner not in named
            continue
        plan = PruningPlan([Stage(pruner, where.get("layer", 0), keep_tokens=3)])
        if pruner in named:  # control: what is offered works, and all that works is offered
            attach(model, plan)
            with torch.no_grad():
                model(**batch([(5, 1, 7)], family=case[0], config=model.config))
            detach(model)
        else:
            with pytest.raises(ValueError, match=f"Pruner '{pruner}' needs"):
                attach(model, plan)


def test_what_exists_is_not_refused(lend: Any) -> None:
    for case, words, _, _ in CASES.values():
        if case == CLIP and set(words) <= {"keys", "tower_keys", "tower_features"}:
            attach(lend(case), plan_of(*words, layer=2, layers=(-3, 2)))
            detach(lend(case))
    attach(lend(LFM2), plan_of("keys", "attention", layer=2))
    attach(lend(SIGLIP), plan_of("tower_received"))


def test_class_token_among_the_vision_tokens(lend: Any) -> None:
    model = lend(CLIP)
    model.config.vision_feature_select_strategy = "full"
    try:
        with pytest.raises(ValueError, match="strategy 'full' the class token is a vision token; take another"):
            attach(model, plan_of("tower_keys"))
    finally:
        model.config.vision_feature_select_strategy = "default"


def test_masks_of_flex_attention_cannot_be_read(lend: Any) -> None:
    model = lend(CLIP)
    model.config.text_config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(ValueError, match="flex attention cannot be read; load with attn_implementation='sdpa'"):
            attach(model, plan_of("attention_last_vision", layer=2))
        attach(model, plan_of("keys", layer=2))
    finally:
        model.config.text_config._attn_implementation = "sdpa"


def test_features_that_came_without_are_refused(lend: Any) -> None:
    """Encoded in mode off, nothing watched the tower."""
    model = lend(CLIP)
    inputs = batch([(5, 1, 7)])
    ids = {k: v for k, v in inputs.items() if k != "pixel_values"}
    attach(model, plan_of("tower_keys"))
    with torch.no_grad():
        with mode(model, "off"):
            encoded = {"image": model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
            model(**ids, mm_encoder_outputs=encoded)
        with pytest.raises(ValueError, match="^The image features of this call came without tower_keys: .*encode"):
            model(**ids, mm_encoder_outputs=encoded)
        encoded = {"image": model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
        model(**ids, mm_encoder_outputs=encoded)


def test_a_layer_is_looked_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    once = layer_probe.run_to_kernel
    monkeypatch.setattr(layer_probe, "run_to_kernel", lambda layer, *rest: looked.append(layer) or once(layer, *rest))
    words = ("keys", "attention", "attention_prompt", "attention_last_vision", "text")
    stages = [
        Stage(Looks(words), 2, keep_tokens=9),
        Stage("uniform", 3, keep_tokens=5),
        Stage(Looks(words), 4, keep_tokens=3),
    ]
    attach(model, PruningPlan(stages))
    with torch.no_grad():
        model(**batch([(5, 2, 7), (3, 1, 4)]))
    layers = model.model.language_model.layers
    assert looked == [layers[1], layers[3]]
