"""The parts of the vLLM plug-in that need no vLLM: counts, selections, positions, texts, and what is registered."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import batch, tiny_model
from torch import Tensor

import tpcompress as tp
from tpcompress.families import list_families
from tpcompress.insertion.features import prune_features
from tpcompress.serving.vllm.adapter import list_adapters
from tpcompress.serving.vllm.counts import (
    BASE,
    ItemRow,
    item_layouts,
    item_rows,
    prompt_positions,
    read_offsets,
    row_offsets,
    shortened,
)

ITEMS = {"qwen2_5_vl": ("image", "video"), "internvl": ("wide", "image"), "llava_onevision": ("wide", "video")}
"""What the prompt of a family holds; two images elsewhere."""
PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "ratio": ({"keep_ratio": 0.3}, "image"),
    "count": ({"keep_tokens": 7}, "image"),
    "tiles": ({"keep_tokens": 3}, "tile"),
}
"""Budget and scope."""


class Seen:
    """One prefill of an attached tiny model: its input, features and positions, and what it retained."""

    def __init__(self, family: str, pruner: Any, budget: dict[str, Any], scope: str = "image") -> None:
        self.adapter, kinds = list_adapters()[family], ITEMS.get(family, ("image", "image"))
        self.model = tiny_model(family)
        self.inputs = batch([(5, kinds, 4)], family=family)
        self.positions: Any = None
        stages = [tp.Stage(pruner, 0, **budget)]
        self.plan = tp.PruningPlan(stages, scope=scope)
        tp.attach(self.model, self.plan)
        language_model = self.model.get_submodule(list_families()[family].language_model)
        handle = language_model.register_forward_pre_hook(self._keep, with_kwargs=True)
        with tp.record(self.model) as trace, torch.no_grad():
            self.model(**self.inputs, use_cache=True)
        handle.remove()
        self.stage = trace.stages[0]
        self.modalities = ["video" if kind == "video" else "image" for kind in kinds]

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        self.positions, self.hidden = kwargs["position_ids"], kwargs["inputs_embeds"]

    def fields(self, number: int) -> dict[str, Tensor]:
        """What vLLM's processor would give for one item."""
        modality = self.modalities[number]
        index = self.modalities[:number].count(modality)
        tiles = {
            "internvl": {"image_num_patches": torch.tensor([[3, 1][number]])},
            "gemma3": {"num_patches": torch.ones(1)},
        }
        found = tiles.get(self.model.config.model_type, {})
        for name in self.adapter.fields:
            value = self.inputs.get(name)
            if value is not None and (name.startswith("pixel_values") or name.startswith((modality, "second"))):
                found[name] = value[index : index + 1]
        return found


def placeholder_runs(seen: Seen) -> list[tuple[int, int]]:
    """Start and length of each item's placeholders in the unpruned prompt."""
    ids = seen.inputs["input_ids"][0]
    config = seen.model.config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    known = torch.tensor(sorted({getattr(config, name) for name in names if hasattr(config, name)}))
    runs: list[tuple[int, int]] = []
    for place in torch.isin(ids, known).nonzero()[:, 0].tolist():
        if runs and sum(runs[-1]) == place:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return runs


@pytest.mark.parametrize("budget", PLANS)
@pytest.mark.parametrize("family", list_adapters())
def test_counts_tokens_and_positions_are_those_of_transformers(family: str, budget: str) -> None:
    seen = Seen(family, "divprune", *PLANS[budget])
    config, plan, runs = seen.model.config, seen.plan, placeholder_runs(seen)
    ids = seen.inputs["input_ids"][0].tolist()
    shared: Any = {"adapter": seen.adapter, "config": config}
    items, offsets, short, layouts = [], [], [], []
    done = 0
    for number, (start, length) in enumerate(runs):
        own: Any = {"modality": seen.modalities[number], "fields": seen.fields(number), "total": length}
        rows = item_rows(plan, **shared, **own)
        layouts.append(item_layouts(**shared, **own))
        short += ids[done:start]
        kept = shortened(ids[start : start + length], [True] * length, rows)
        items.append((len(short), torch.ones(len(kept), dtype=torch.bool), rows))
        short += kept
        done = start + length
        offsets.append((rows, own))
    short += ids[done:]
    assert len(short) == seen.stage.sequence_out

    places = torch.cat([torch.arange(start, start + length) for start, length in runs])
    features = unpruned_inputs(seen)[0, places]
    stage = plan.stages[0]
    index, tokens = prune_features(stage.pruner, stage.budget, plan.scope, features, sum(layouts, []))
    assert torch.equal(tokens[index], seen.hidden[0, torch.isin(torch.tensor(short), torch.tensor(ids)[places])])

    position, delta = prompt_positions(len(short), items)
    first = start = 0
    for (column, embeds, rows), (_, own), (_, length) in zip(items, offsets, runs, strict=True):
        here = index[first : first + len(embeds)] - start
        grid = (
            None if seen.adapter.positions is None else seen.adapter.positions(config, own["modality"], own["fields"])
        )
        position[:, column : column + len(embeds)] += read_offsets(row_offsets(here, rows, grid).bfloat16())
        first, start = first + len(embeds), start + length
    expected = seen.positions[-3:, 0] if seen.positions.ndim == 3 else seen.positions.expand(3, -1)
    assert torch.equal(position, expected)
    assert len(short) + delta == int(expected[:, -1].max()) + 1


def unpruned_inputs(seen: Seen) -> Tensor:
    """What the language model gets without the plan."""
    with tp.disabled(seen.model), torch.no_grad():
        language_model = seen.model.get_submodule(list_families()[list_name(seen)].language_model)
        found: list[Tensor] = []
        handle = language_model.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        seen.model(**seen.inputs)
        handle.remove()
    return found[0]


def list_name(seen: Seen) -> str:
    return str(seen.model.config.model_type)


def test_features_of_merging_pruners_are_those_of_transformers() -> None:
    seen = Seen("llava", "pool", {"keep_tokens": 9})
    (start, length), *_ = placeholder_runs(seen)
    features = unpruned_inputs(seen)[0, start : start + length]
    layouts = item_layouts(seen.adapter, seen.model.config, "image", seen.fields(0), length)
    index, tokens = prune_features(seen.plan.stages[0].pruner, seen.plan.stages[0].budget, "image", features, layouts)
    assert len(index) == 9
    assert torch.equal(tokens[index], seen.hidden[0, start : start + 9])


def test_offsets_survive_half_precision() -> None:
    index = torch.arange(0, BASE * BASE, 257)
    rows = [ItemRow(BASE * BASE, BASE, BASE * BASE)]
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(read_offsets(row_offsets(index, rows, None).to(dtype)), index.expand(3, -1))


def test_text_between_the_rows_of_an_item_keeps_its_place() -> None:
    rows = [ItemRow(4, 2, 4), ItemRow(3, 1, 3)]
    tokens = [9, 5, 5, 5, 5, 8, 5, 5, 5]
    short = shortened(tokens, [token == 5 for token in tokens], rows)
    assert short == [9, 5, 5, 8, 5]
    position, delta = prompt_positions(8, [(1, torch.tensor(short) == 5, rows)])
    #                               word 9  row 0  8  row 1  words
    assert position[0].tolist() == [0, 1, 2, 2, 6, 7, 10, 11]
    assert delta == 4
    # A prompt that ends with its image goes on after the end of the unpruned image.
    assert prompt_positions(3, [(1, torch.ones(2, dtype=torch.bool), [ItemRow(4, 2, 4)])])[1] == 2


def test_a_layout_that_vllm_counts_otherwise_is_an_error() -> None:
    plan, adapter = tp.PruningPlan.of("divprune:8@0"), list_adapters()["qwen2_5_vl"]
    fields = {"image_grid_thw": torch.tensor([[1, 8, 8]])}
    config = list_families()["qwen2_5_vl"].tiny.config()
    with pytest.raises(ValueError, match="returned \\[17\\]"):
        item_rows(plan, adapter, config, "image", fields, 17)


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"tpcompress": "tpcompress.serving.vllm:register"}


def test_adapters_are_the_files() -> None:
    assert {"llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"} <= list_adapters().keys()
    for model_type, adapter in list_adapters().items():
        family = next(family for family in list_families().values() if model_type in family.model_types)
        assert (adapter.positions is not None) == (family.positions == "mrope")
        assert all(family.layouts(modality) for modality in set(adapter.modalities) - {"video"})
