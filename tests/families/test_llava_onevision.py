"""LLaVA-OneVision's `batch_num_images`: several images of one sample come whole, an only one in tiles.

`Tiny` says how many ids an image has by its kind alone, so this cannot be one of its kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exact import check
from support import IMAGE, generate, tiny_model

from tpcompress.families import Grid, Layout, resolve
from tpcompress.families.llava_next import SIZES, TILES
from tpcompress.families.llava_onevision import COUNTS
from tpcompress.insertion.attach import attach, detach, is_attached, record
from tpcompress.insertion.encode import layouts_of
from tpcompress.insertion.plan import PruningPlan, Stage

WHOLE = 16 + 1
"""Placeholders of one of several images: 4 x 4 and a newline."""

SAMPLES = (("image",), ("wide", "image", "wide"), (), ("image", "image"))


def inputs_of(*samples: tuple[str, ...]) -> dict[str, Any]:
    """A left-padded batch; the processor sends 0 for a sample without images."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for kinds in samples:
        row = torch.randint(3, 90, (5,), generator=g).tolist()
        for kind in kinds:
            row += [IMAGE] * (COUNTS[kind] if len(kinds) == 1 else WHOLE)
            row += torch.randint(3, 90, (3,), generator=g).tolist()
        rows.append(row + torch.randint(3, 90, (4,), generator=g).tolist())
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = torch.tensor(row), 1
    images = [kind for kinds in samples for kind in kinds]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(len(images), max(TILES.values()), 3, 16, 16, generator=g),
        "image_sizes": torch.tensor([SIZES[kind] for kind in images]),
        "batch_num_images": torch.tensor([len(kinds) for kinds in samples]),
    }


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    """Two copies of one model."""
    return tiny_model("llava_onevision"), tiny_model("llava_onevision")


@pytest.fixture
def pair(made: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The first of them to attach a plan to; detached afterwards."""
    yield made
    if is_attached(made[0]):
        detach(made[0])


def test_layouts_of_only_images_and_of_several(pair: tuple[Any, Any]) -> None:
    _, base = pair
    inputs = inputs_of(*SAMPLES)
    arguments = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = base.model.get_image_features(**arguments, return_dict=True).pooler_output
    layouts = layouts_of(resolve(base), inputs)["image"]
    assert [layout.placeholders for layout in layouts] == [len(x) for x in features] == [COUNTS["image"], *[WHOLE] * 5]
    assert layouts[0].grids == (Grid(4, 4), Grid(4, 6, newline=True))
    assert layouts[1:] == [Layout((Grid(4, 4),), tail=1)] * 5


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("scope", ["image", "prompt"])
def test_a_cut_equals_the_reference(pair: tuple[Any, Any], scope: str, positions: str) -> None:
    model, base = pair
    stages = [Stage("divprune", 0, keep_ratio=0.6), Stage("uniform", 2, keep_ratio=0.3)]
    plan = PruningPlan(stages, scope=scope, positions=positions)
    check(model, base, plan, inputs_of(*SAMPLES))


def test_generation_keeps_the_same_number_of_each_image(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    inputs = inputs_of(*SAMPLES)
    attach(model, PruningPlan([Stage("uniform", 1, keep_tokens=6)]))
    with record(model) as trace:
        cached = generate(model, inputs)
    assert trace.stages[0].vision_out == [6] * 6
    assert torch.equal(cached.sequences, generate(model, inputs, use_cache=False).sequences)
