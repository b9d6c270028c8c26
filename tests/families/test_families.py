"""Families: found by being there, resolved on real models, and clear about what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import PLACEHOLDER, TOKENS, batch, model_cases, tiny_model
from torch import nn
from transformers import LlamaConfig, LlavaConfig, MllamaConfig

from tpcompress.families import family_of, list_families, resolve, rotary_of
from tpcompress.families.llava import TOWERS, image_tokens, tiny_config
from tpcompress.insertion.attach import attach
from tpcompress.insertion.plan import PruningPlan, Stage

cases = pytest.mark.parametrize("case", model_cases(), ids=lambda case: "-".join([case[0], *case[1]]))


def test_families_have_distinct_names_and_types() -> None:
    families = list_families()
    assert families
    assert all(family.name == name for name, family in families.items())
    types = [t for family in families.values() for t in family.model_types]
    assert len(types) == len(set(types))


@cases
def test_parts_are_what_they_are_called(case: tuple[str, tuple[Any, ...]]) -> None:
    model = tiny_model(case[0], *case[1])
    parts = resolve(model)
    assert parts.family is family_of(model.config)
    assert isinstance(parts.layers, nn.ModuleList)
    assert len(parts.layers) == model.config.get_text_config().num_hidden_layers
    assert parts.hidden_size == model.get_input_embeddings().embedding_dim
    assert parts.placeholder_id == PLACEHOLDER
    assert sum(p.numel() for p in model.parameters()) < 400_000
    order = []
    for name in ("core", "vision_tower", "projector", "language_model"):
        getattr(parts, name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
    with torch.no_grad():
        model(**batch([(5, 1, 7)]))
    assert order == ["core", "vision_tower", "projector", "language_model"]
    attention = parts.layers[0].self_attn
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    cos, sin = torch.ones(1, 3, 16), torch.zeros(1, 3, 16)
    assert all(torch.equal(a, b) for a, b in zip(rotary_of(attention)(q, k, cos, sin), (q, k), strict=True))


@cases
def test_counts_agree_with_the_features(case: tuple[str, tuple[Any, ...]]) -> None:
    model = tiny_model(case[0], *case[1])
    inputs = batch([(5, 1, 7), (3, 2, 4)])
    tokens = resolve(model).family.image_tokens(model.config, inputs)
    assert tokens is not None
    with torch.no_grad():
        encoded = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    assert tokens.counts == [len(x) for x in encoded.pooler_output] == [TOKENS] * 3
    assert tokens.grids == [(8, 8)] * 3
    again = resolve(model).family.image_tokens(model.config, {"mm_encoder_outputs": {"image": encoded}})
    assert again == tokens
    assert resolve(model).family.image_tokens(model.config, {"input_ids": inputs["input_ids"]}) is None
    assert resolve(model).family.image_tokens(model.config, {"pixel_values": inputs["pixel_values"][:0]}) is None


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_every_select_strategy_is_counted_rightly(tower: str, strategy: str) -> None:
    model = tiny_model("llava", tower)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.model.get_image_features(
            pixel_values=pixels, vision_feature_select_strategy=strategy, return_dict=True
        )
    tokens = image_tokens(model.config, {"pixel_values": pixels, "vision_feature_select_strategy": strategy})
    assert tokens.counts == [len(x) for x in features.pooler_output]
    rows, cols = tokens.grids[0]
    assert rows * cols == tokens.counts[0]


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'llava_foo' is not a known family \(known: .*Did you mean llava\?") as error:
        family_of(SimpleNamespace(model_type="llava_foo"))
    assert "\n" not in str(error.value)
    for config in (MllamaConfig(), LlamaConfig()):
        with pytest.raises(ValueError, match=f"'{config.model_type}' is not a known family"):
            family_of(config)


def test_unsupported_tower_and_window() -> None:
    config = LlavaConfig(vision_config={"model_type": "pixtral"}, text_config={"model_type": "llama"})
    with pytest.raises(ValueError, match="vision tower 'pixtral' is not supported; supported: clip_vision_model"):
        family_of(config)
    config = tiny_config()
    config.text_config.sliding_window = 64
    with pytest.raises(ValueError, match="sliding window of 64; set text_config.sliding_window to null"):
        family_of(config)
    config.text_config.use_sliding_window = False
    assert family_of(config).name == "llava"


def test_attach_refuses_what_the_family_refuses() -> None:
    model = tiny_model()
    model.config.text_config.sliding_window = 64
    before = set(vars(model))
    with pytest.raises(ValueError, match="sliding window"):
        attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=3)]))
    assert set(vars(model)) == before
