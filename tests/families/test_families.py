"""Families: found by being there, true to the models they describe, and clear about what they refuse."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import Case, batch, case_id, is_placeholder, model_cases, tiny_model
from torch import nn
from transformers import LlamaConfig, LlavaConfig, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tpcompress.families import Layout, Parts, family_of, list_families, resolve
from tpcompress.families.refused import REFUSED
from tpcompress.insertion.attach import attach
from tpcompress.insertion.plan import PruningPlan, Stage

every_case = pytest.mark.parametrize("case", model_cases(), ids=case_id)
ORDER = ("core", "vision_tower", "projector", "language_model")


@cache
def parts_of(case: Case) -> Parts:
    return resolve(tiny_model(case[0], *case[1]))


def encode(parts: Parts, inputs: dict[str, Any]) -> dict[str, tuple[list[int], list[Layout]]]:
    """By modality: tokens of each feature that the model's encoder makes, and the family's layouts for them."""
    found = {}
    for modality in parts.placeholder_ids:
        function = getattr(parts.core, f"get_{modality}_features")
        arguments = {k: v for k, v in inputs.items() if k in inspect.signature(function).parameters}
        if any(name.startswith("pixel_values") for name in arguments):
            with torch.no_grad():
                features = function(**arguments, return_dict=True).pooler_output
            sizes = [x.numel() // x.shape[-1] for x in features]
            make = parts.family.layouts(modality)
            assert make is not None
            found[modality] = sizes, make(parts.model.config, arguments, sizes)
    return found


def pictures(parts: Parts, *samples: Sequence[str]) -> dict[str, Any]:
    """Inputs of one call whose samples hold these kinds of images."""
    return batch([(3, kinds, 4) for kinds in samples], family=parts.family.name, config=parts.model.config)


def test_families_have_distinct_names_and_types() -> None:
    families = list_families()
    assert families
    assert all(family.name == name for name, family in families.items())
    types = [t for family in families.values() for t in family.model_types]
    assert len(types) == len(set(types))
    assert set(types) <= set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("name", list_families())
def test_the_parts_of_a_description_fit_together(name: str) -> None:
    family = list_families()[name]
    kinds = family.tiny.kinds
    assert kinds[0] == "image"
    assert set(kinds) <= {"image", "wide", "video"}
    assert "video" not in kinds or family.video_layouts is not None
    assert family.positions in ("1d", "mrope")
    assert family.layouts("image") is family.image_layouts
    assert family.layouts("video") is family.video_layouts
    assert all(limit.endswith(".") and "\n" not in limit for limit in family.limits)
    variants = [family.tiny.config(*variant) for variant in family.tiny.variants]
    assert {config.model_type for config in variants} == set(family.model_types), "every model type has a tiny model"


@every_case
def test_parts_run_in_their_order(case: Case) -> None:
    parts = parts_of(case)
    assert parts.family is family_of(parts.model.config)
    assert isinstance(parts.layers, nn.ModuleList)
    assert len(parts.layers) == parts.text_config.num_hidden_layers
    assert parts.hidden_size == parts.model.get_input_embeddings().embedding_dim
    assert set(parts.placeholder_ids) == {m for m in ("image", "video") if parts.family.layouts(m)}
    assert sum(p.numel() for p in parts.model.parameters()) < 1_000_000
    seen: list[str] = []
    handles = [
        getattr(parts, name).register_forward_pre_hook(lambda *_, name=name: seen.append(name)) for name in ORDER
    ]
    with torch.no_grad():
        parts.model(**pictures(parts, ["image"]))
    for handle in handles:
        handle.remove()
    assert tuple(dict.fromkeys(seen)) == ORDER


@every_case
def test_layouts_agree_with_the_encoders(case: Case) -> None:
    parts, draw = parts_of(case), random.Random(case_id(case))
    kinds = parts.family.tiny.kinds
    mixed = [[draw.choices(kinds, k=draw.randint(0, 3)) for _ in range(3)] for _ in range(3)]
    for samples in [*([[kind]] for kind in kinds), [list(kinds) * 2], *mixed]:
        if not any(samples):
            continue
        inputs = pictures(parts, *samples)
        found = encode(parts, inputs)
        for modality, (sizes, layouts) in found.items():
            assert [layout.placeholders for layout in layouts] == sizes
            assert all(layout.video == (modality == "video") for layout in layouts)
        assert sum(sum(sizes) for sizes, _ in found.values()) == int(is_placeholder(inputs["input_ids"]).sum())


@every_case
def test_tables_read_rectangles_row_by_row(case: Case) -> None:
    parts = parts_of(case)
    inputs = pictures(parts, list(parts.family.tiny.kinds))
    for _, layouts in encode(parts, inputs).values():
        for layout in layouts:
            table, (rows, cols) = layout.table.tolist(), layout.canvas
            assert len(table) == layout.count
            places = [place for place, *_ in table]
            assert places == sorted(set(places)), "in the order of the sequence, each once"
            assert places[0] == 0
            assert places[-1] == layout.placeholders - layout.tail - 1 - layout.grids[-1].newline
            spots = [(tile, row, col) for _, row, col, tile in table]
            assert spots == sorted(set(spots))
            assert len({spot[1:] for spot in spots}) == len(spots), "rectangles do not overlap on the canvas"
            assert all(0 <= row < rows and 0 <= col < cols for _, row, col in spots)
            assert {tile for tile, *_ in spots} == set(range(len(layout.grids)))


@every_case
def test_the_token_of_a_corner_sees_that_corner(case: Case) -> None:
    """Rows and columns are those of the image: where pixels are images, the nearest token changes most."""
    parts = parts_of(case)
    inputs = pictures(parts, ["image"])
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim < 4 or pixels.shape[-3] != 3:
        pytest.skip("its processor makes patches or frames, not images")
    if "image_position_ids" in inputs or "image_grid_thw" in inputs or parts.family.name == "idefics2":
        pytest.skip("its tokens are patches of its processor, or have no grid")
    (_, layouts) = encode(parts, inputs)["image"]
    grid, first = layouts[0].grids[0], layouts[0].table
    sides = inputs["image_sizes"][0].tolist() if "image_sizes" in inputs and pixels.ndim == 4 else pixels.shape[-2:]
    height, width = sides[0] // grid.rows, sides[1] // grid.cols
    names = inspect.signature(parts.core.get_image_features).parameters
    arguments = {k: v for k, v in inputs.items() if k in names}

    def tokens(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = parts.core.get_image_features(**arguments | {"pixel_values": pixel_values}, return_dict=True)
        return made.pooler_output[0].flatten(0, -2)

    before = tokens(pixels)
    for row, col in ((0, grid.cols - 1), (grid.rows - 1, 0), (grid.rows // 2, 1)):
        changed = pixels.clone()
        image = changed.reshape(-1, *pixels.shape[-3:])[0]
        image[:, row * height : (row + 1) * height, col * width : (col + 1) * width] += 3.0
        gap = (tokens(changed) - before).norm(dim=-1)[first[first[:, 3] == 0][:, 0]]
        assert divmod(int(gap.argmax()), grid.cols) == (row, col)


@every_case
def test_stages_act_where_no_later_layer_reads_older_keys(case: Case) -> None:
    parts = parts_of(case)
    depth, keys_of = len(parts.layers), parts.family.keys_of
    assert all(0 <= keys_of(parts.text_config, layer) <= layer for layer in range(depth))
    possible = [
        stage
        for stage in range(depth)
        if stage == 0 or not any(keys_of(parts.text_config, layer) < stage for layer in range(stage, depth))
    ]
    assert parts.stage_layers == possible
    shared = {("gemma4", ("small",)): [0, 1, 2]}
    assert possible == shared.get(case, list(range(depth)))


def test_attach_refuses_layers_in_front_of_shared_keys() -> None:
    model = tiny_model("gemma4", "small")
    before = set(vars(model))
    with pytest.raises(ValueError, match="acts at layer 3, .* can be pruned at layers 0 to 2"):
        attach(model, PruningPlan([Stage("uniform", 3, keep_tokens=3)]))
    assert set(vars(model)) == before


# --------------------------------------------------------------------------------------------------------- refusals


def refusal(config: Any) -> str:
    with pytest.raises(ValueError, match=".") as error:
        family_of(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_model_names_the_nearest() -> None:
    text = refusal(SimpleNamespace(model_type="llava_foo"))
    assert text.startswith("'llava_foo' is not a known family (known: ")
    assert " Did you mean llava?" in text
    assert "'llama' is not a known family" in refusal(LlamaConfig())


def test_refused_model_types_exist_and_say_why() -> None:
    covered = {t for family in list_families().values() for t in family.model_types}
    assert not covered & set(REFUSED)
    assert set(REFUSED) <= set(CONFIG_MAPPING_NAMES)
    for model_type, reason in REFUSED.items():
        assert "\n" not in reason
        assert not reason.endswith(".")
        text = refusal(SimpleNamespace(model_type=model_type))
        assert text == f"{model_type} cannot be pruned: {reason}. See `tpcompress families` for others."


def test_a_real_mllama_is_refused_and_stays_as_it_is() -> None:
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 128, "cross_attention_layers": [1], "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "attention_heads": 2, "num_hidden_layers": 2,
        "num_global_layers": 1, "image_size": 16, "patch_size": 4, "vision_output_dim": 64, "max_num_tiles": 1,
        "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision))
    before = set(vars(model))
    with pytest.raises(ValueError, match="^mllama cannot be pruned: its text attends to images by cross-attention"):
        attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=3)]))
    assert set(vars(model)) == before


def test_towers_of_llava_without_a_grid_are_refused() -> None:
    text = refusal(LlavaConfig(vision_config={"model_type": "pixtral"}, text_config={"model_type": "llama"}))
    assert text.startswith("llava cannot be pruned here: vision tower 'pixtral' is not supported; supported: clip_")
    model = tiny_model("llava")
    model.config.vision_config.model_type = "pixtral"
    before = set(vars(model))
    with pytest.raises(ValueError, match="vision tower 'pixtral' is not supported"):
        attach(model, PruningPlan([Stage("uniform", 0, keep_tokens=3)]))
    assert set(vars(model)) == before


@pytest.mark.parametrize(("family", "value"), [("gemma3", True), ("gemma4", "all")])
def test_encoders_made_of_a_decoder_are_refused(family: str, value: Any) -> None:
    tiny = list_families()[family].tiny
    config = tiny.config(*tiny.variants[0])
    config.get_text_config().use_bidirectional_attention = value
    assert "its text attention is bidirectional" in refusal(config)
