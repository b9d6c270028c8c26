"""LLaVA on a DINOv2 tower: loads from a folder in hub layout, prunes, and shows pruners the layers of its tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import batch, tiny_model
from transformers import AutoModelForImageTextToText

import tpcompress as tp
from tpcompress.families import list_families, resolve

CASE = ("llava", ("dinov2",))
TOKENS, KEPT = 64, 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("llava_dinov2")
    tiny_model(CASE[0], *CASE[1]).save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def inputs(model: Any) -> dict[str, Any]:
    return batch([(5, ["image"], 7), (4, 0, 9)], family=CASE[0], config=model.config)


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_its_tower_is_a_real_one(model: Any) -> None:
    parts = resolve(model)
    assert type(parts.vision_tower).__name__ == "Dinov2Model"
    assert parts.family.name == "llava"
    assert parts.family.tower is dict(list_families()["llava"].towers)["dinov2"]
    assert parts.family.tower.has_class(model.config)


def test_the_class_token_is_no_vision_token(model: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        seen = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(seen[model.config.vision_feature_layer][:, 1:])
    assert [len(x) for x in features] == [TOKENS]
    assert torch.equal(torch.stack(list(features)), expected)


@pytest.mark.parametrize("pruner", ["divprune", "visionzip", "fastervlm"])
def test_pruners_read_the_class_token_and_layers_of_the_tower(model: Any, inputs: dict[str, Any], pruner: str) -> None:
    dense = logits_of(model, inputs)
    tp.attach(model, tp.PruningPlan([tp.Stage(pruner, keep_tokens=KEPT)]))
    try:
        pruned = logits_of(model, inputs)
    finally:
        tp.detach(model)
    assert pruned.isfinite().all()
    assert not torch.allclose(pruned[0], dense[0], atol=1e-5)
    assert torch.allclose(pruned[1], dense[1], atol=1e-5)  # the sample without an image
    assert torch.equal(logits_of(model, inputs), dense)


def test_class_attention_is_what_the_tower_computes(model: Any, inputs: dict[str, Any]) -> None:
    """FasterVLM keeps the patches that the class token attends to most in the tower's last but one layer."""
    with torch.no_grad():
        seen = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    expected = seen[-2][0, :, 0, 1:].mean(0).topk(KEPT).indices.sort().values
    tp.attach(model, tp.PruningPlan([tp.Stage("fastervlm", keep_tokens=KEPT)]))
    try:
        with tp.record(model) as trace:
            logits_of(model, inputs)
    finally:
        tp.detach(model)
    kept = trace.stages[0].retained_RV[0].nonzero()[:, 0]
    assert kept.tolist() == expected.tolist()
