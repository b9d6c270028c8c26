"""Rules that read the vision tower: their variants keep the contract, never make the host wait, and run in models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import check
from support import batch, config_id, inexact_configs, make_view, pruner_configs, tiny_model
from transformers.models.clip.modeling_clip import CLIPAttention

from tpcompress.insertion.attach import ATTACHED, attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import create

RECIPES = Path(__file__).parents[2] / "recipes" / "free"

NAMES = ("fastervlm", "vispruner", "visionzip", "prumerge", "holov", "hiprune")
DEFAULTS = [{"type": name} for name in NAMES]
VARIANTS = [config for config in pruner_configs() if config["type"] in NAMES and config not in DEFAULTS]
INEXACT = [config for config in inexact_configs() if config["type"] in NAMES]


# ------------------------------------------------------------------------------------------------------------ models


def at_home(config: dict[str, Any]) -> dict[str, Any]:
    """The tiny tower has three layers, so layer 9 is not there."""
    return config | ({"object_layer": 0} if config["type"] == "hiprune" else {})


def elsewhere(config: dict[str, Any], family: str) -> dict[str, Any]:
    """For a tower without a class token; what the projector of Qwen is given are several patches."""
    behind = {"merge_at": "tokens"} if config["type"] in ("visionzip", "prumerge") and family != "llava" else {}
    return at_home(config) | ({"attention": "received"} if config["type"] != "hiprune" else {}) | behind


@cache
def twins(*arguments: str) -> tuple[Any, Any]:
    return tiny_model(*arguments), tiny_model(*arguments)


@pytest.fixture
def clip() -> Iterator[tuple[Any, Any]]:
    """A model to attach plans to, and its base."""
    yield from lent("llava", "clip_vision_model")


@pytest.fixture(params=[("llava", "siglip_vision_model"), ("qwen2_5_vl",)], ids=lambda p: p[-1])
def classless(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, Any]]:
    for model, base in lent(*request.param):
        yield request.param[0], model, base


def lent(*arguments: str) -> Iterator[tuple[Any, Any]]:
    model, base = twins(*arguments)
    yield model, base
    if hasattr(model, ATTACHED):
        detach(model)


@pytest.mark.parametrize("config", DEFAULTS + VARIANTS, ids=config_id)
def test_in_a_model_with_a_class_token(clip: tuple[Any, Any], config: dict[str, Any]) -> None:
    """Logits are those of the reference, which gets what the rule retained."""
    model, base = clip
    check(model, base, PruningPlan([Stage(at_home(config), keep_tokens=9)]), batch([(5, 2, 7), (3, 1, 8)]))


@pytest.mark.parametrize("config", DEFAULTS, ids=config_id)
def test_in_a_model_without_one(classless: tuple[str, Any, Any], config: dict[str, Any]) -> None:
    family, model, base = classless
    inputs = batch([(5, ["image"], 7), (3, ["image", "image"], 8)], family=family, config=model.config)
    if config["type"] != "hiprune":
        with pytest.raises(ValueError, match="has no class token; read tower_received instead|work token by token"):
            attach(model, PruningPlan([Stage(config, keep_tokens=9)]))
    check(model, base, PruningPlan([Stage(elsewhere(config, family), keep_tokens=9)]), inputs)


@pytest.mark.parametrize("config", INEXACT, ids=config_id)
def test_counts_of_their_own_in_a_model(clip: tuple[Any, Any], config: dict[str, Any]) -> None:
    model, base = clip
    check(model, base, PruningPlan([Stage(config, keep_tokens=9)]), batch([(5, 2, 7), (3, 1, 8)]))


def test_layers_of_the_tower() -> None:
    layers = {config["type"]: create(config).tower_layers for config in DEFAULTS}
    assert layers.pop("prumerge") == (-1,), "its attention is the last layer's"
    assert layers.pop("hiprune") == (8, -2)
    assert set(layers.values()) == {(-2,)}


def test_a_tower_of_fewer_layers_is_refused(clip: tuple[Any, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"tower layers \(8, -2\), but the tower has layers -3 to 2; name some of these"
    ):
        attach(clip[0], PruningPlan([Stage("hiprune", keep_tokens=9)]))


@pytest.mark.parametrize("name", ["visionzip", "prumerge"])
def test_merged_tokens_are_the_projectors(clip: tuple[Any, Any], name: str) -> None:
    """At layer 0 a token's projected features are the token, so merging in front and behind differ by the bend only."""
    model, _ = clip
    attach(model, PruningPlan([Stage(name, keep_tokens=9)]))
    with record(model) as trace, torch.no_grad():
        model(**batch([(5, 2, 7)]))
    stage = trace.stages[-1]
    view, selection = stage.view, stage.selection
    assert torch.allclose(view.project(view.projector_BVC), view.vision_BVD, atol=1e-5)
    gap = (selection.vision_BVD - view.vision_BVD).abs().amax(-1)
    assert (gap > 1e-3).any()
    behind = create({"type": name, "merge_at": "tokens"})(view, torch.full((len(gap),), 9))
    assert torch.equal(behind.keep_BV, selection.keep_BV)
    assert torch.equal((behind.vision_BVD - view.vision_BVD).abs().amax(-1) > 0, gap > 0)
    assert not torch.allclose(behind.vision_BVD, selection.vision_BVD, atol=1e-3)


def test_no_class_of_the_process_is_changed(clip: tuple[Any, Any]) -> None:
    """The official VisionZip replaces the attention of every CLIP tower in the process."""
    before = CLIPAttention.forward
    attach(clip[0], PruningPlan([Stage("visionzip", keep_tokens=9)]))
    assert CLIPAttention.forward is before


COUNTS = {
    "fastervlm": 64,
    "vispruner": 64,
    "visionzip": 64,
    "prumerge": 32,
    "prumerge_plus": 144,
    "holov": 64,
    "hiprune": 64,
}


@pytest.mark.parametrize("recipe", COUNTS)
def test_recipes_have_the_papers_counts(recipe: str) -> None:
    (stage,) = PruningPlan.of(RECIPES / f"{recipe}.yaml").stages
    assert stage.layer == 0
    x = torch.randn(1, 576, 16, generator=torch.Generator().manual_seed(0))
    view = make_view(stage.pruner, x, (24, 24))
    assert int(stage.pruner(view, torch.tensor([stage.keep_tokens])).keep_BV.sum()) == COUNTS[recipe]
