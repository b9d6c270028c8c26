"""`tp.summary`: counts, the encoder's own merging, FLOPs and KV bytes, against the model that is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import batch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import tpcompress as tp
from tpcompress.families import list_families
from tpcompress.insertion.cost import decoder_flops, has_formula, head_size, key_width, kv_bytes, layer_configs
from tpcompress.models import load_base

VARIANTS = [(name, variant) for name, family in list_families().items() for variant in family.tiny.variants]
VIDEO_ONLY = [("glm4v", ("glm4v", "videos"))]
CROPPED = {"llava_next", "llava_next_video", "llava_onevision"}
"""Families that crop the padding of tiles after the encoder."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tp.attach(load_base("tiny_llava").eval(), "divprune:64@0,uniform:16@1")


def test_the_counts_are_those_of_a_call(model: Any) -> None:
    text = 64
    ids = torch.tensor([[model.config.image_token_id] * 144 + [5] * text])
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with tp.record(model) as trace, torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, use_cache=True)
    found = tp.summary(model, text_tokens=text)
    assert [stage.vision_out[0] for stage in trace.stages] == list(found.counts) == [64, 16]
    assert found.vision_tokens == 144
    assert found.patches == 144
    assert found.reduction == 9
    assert found.layer_average == 40
    assert found.kv_bytes is not None
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert found.kv_bytes.pruned == cache
    assert found.kv_bytes.share == (64 + 16 + 2 * text) / (2 * (144 + text))


def test_flops_are_those_that_torch_counts() -> None:
    eager = load_base("tiny_llava", attention="eager").eval()  # torch does not count inside fused attention on the CPU
    model = tp.attach(eager, "uniform:64@0,uniform:16@1")
    ids = torch.tensor([[model.config.image_token_id] * 144 + [5] * 64])
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    found = tp.summary(model).flops
    assert found is not None
    for block, expected in ((tp.mode(model, "drop"), found.pruned), (tp.disabled(model), found.dense)):
        with block, torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
        counts = counter.get_flop_counts()
        vision = sum(sum(counts[f"LlavaForConditionalGeneration.model.{part}"].values())
                     for part in ("vision_tower", "multi_modal_projector"))  # fmt: skip
        assert counter.get_total_flops() - vision == pytest.approx(expected, rel=0.02)


def test_the_text_is_a_table(model: Any) -> None:
    lines = str(tp.summary(model)).splitlines()
    assert lines[0].startswith(
        "LlavaForConditionalGeneration: 144 patches -> 144 vision tokens -> 16 retained per image"
    )
    assert lines[2].split() == ["0", "0", "divprune", "64", "tokens", "144", "->", "64"]
    assert lines[3].split() == ["1", "1", "uniform", "16", "tokens", "64", "->", "16"]
    assert any(line.startswith("layer average: 40 of 144 vision tokens (27.8%)") for line in lines)
    assert any("FLOPs" in line and "of dense" in line for line in lines)
    assert any("KV cache" in line and "of dense" in line for line in lines)


def test_a_plan_is_needed_and_counts_are_positive(model: Any) -> None:
    with pytest.raises(ValueError, match="No plan is attached"):
        tp.summary(load_base("tiny_llava"))
    with pytest.raises(ValueError, match="vision_tokens must be at least 1, got 0"):
        tp.summary(model, vision_tokens=0)


@pytest.mark.parametrize(("name", "variant"), [v for v in VARIANTS if v not in VIDEO_ONLY], ids=str)
def test_what_configs_fix_is_what_the_encoder_does(name: str, variant: tuple[Any, ...]) -> None:
    family = list_families()[name]
    config = family.tiny.config(*variant)
    ids = family.tiny.ids(config, "image")
    tokens = sum(i == getattr(config, family.image_token) for i in ids)
    assert family.tokens_per_image(config) in (None, tokens)
    assert (family.tokens_per_image(config) is None) == (not family.one_size)
    merged, pixels = family.patches_per_token(config), family.tiny.pixels(config, [["image"]], torch.Generator())
    if merged is None or name in CROPPED or name.startswith(("gemma4", "lfm2")):  # padded to a fixed size
        return
    values = pixels.get("pixel_values", pixels.get("pixel_values_videos"))
    patch = config.vision_config.patch_size
    patch = patch[0] if isinstance(patch, tuple | list) else patch
    if "image_grid_thw" in pixels:
        patches = int(pixels["image_grid_thw"].prod())
    else:
        patches = values.numel() // (values.shape[-3] * patch**2)
    assert patches == tokens * merged


def test_families_of_any_size_ask_for_the_count() -> None:
    family = list_families()["qwen2_vl"]
    config = family.tiny.config()
    model = tp.attach(AutoModelForImageTextToText.from_config(config), "divprune:64")
    with pytest.raises(ValueError, match="give a row, tp.summary"):
        tp.summary(model)
    found = tp.summary(model, vision_tokens=256)
    assert (found.patches, found.reduction) == (1024, 16)
    inputs = batch([(5, 1, 7)], family="qwen2_vl", config=config)
    found = tp.summary(tp.attach(tp.detach(model), "divprune:16"), inputs=inputs)
    assert (found.vision_tokens, found.counts, found.text_tokens) == (64, (16,), int(inputs["input_ids"].numel()) - 64)
    with pytest.raises(ValueError, match="Both vision_tokens and inputs are given"):
        tp.summary(model, vision_tokens=9, inputs=inputs)
    with pytest.raises(ValueError, match="inputs have no image"):
        tp.summary(model, inputs=batch([(5, 0, 7)], family="qwen2_vl", config=config))


def test_costs_without_a_formula_are_not_stated() -> None:
    family = list_families()["qwen3_5"]
    config = family.tiny.config()
    assert not has_formula(config)
    model = tp.attach(AutoModelForImageTextToText.from_config(config), "divprune:16")
    found = tp.summary(model, vision_tokens=64)
    assert found.flops is None
    assert found.kv_bytes is None
    assert "no formula for this architecture" in str(found)


@pytest.mark.parametrize("family", list(list_families()))
def test_costs_of_every_family_add_up_over_its_layers(family: str) -> None:
    for variant in list_families()[family].tiny.variants:
        config = list_families()[family].tiny.config(*variant)
        if not has_formula(config):
            continue
        text = config.get_text_config()
        depth = text.num_hidden_layers
        apart = [[int(layer == one) for layer in range(depth)] for one in range(depth)]
        assert sum(decoder_flops(config, one, 0) for one in apart) == decoder_flops(config, [1] * depth, 0) > 0
        assert sum(kv_bytes(config, one) for one in apart) == kv_bytes(config, [1] * depth) > 0
        heads = {(head_size(layer), key_width(layer)) for layer in layer_configs(text)}
        assert (len(heads) > 1) == (family == "gemma4_unified")
