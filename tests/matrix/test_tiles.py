"""Budgets over the tiles of an image, where tiles are features of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exact import check, tolerance
from export.helpers import make_processor
from structure import some
from subjects import Subject
from support import case_id, generate, logit_gap

import tpcompress as tp
from tpcompress.export import load
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import Stage

SPLIT = {"smolvlm": [48, 64], "idefics3": [48, 64], "lfm2_vl-lfm2": [48, 69], "aya_vision": [36, 108]}
SPLIT |= {"ovis2": [36, 108], "cohere2_vision": [36, 108], "internvl-qwen2": [36, 108]}
"""Vision tokens of an `image` and of a `wide` one, which has several tiles."""


@some("smolvlm", "lfm2_vl-lfm2", "aya_vision")
def test_a_budget_counts_over_the_tiles_of_an_image(subject: Subject) -> None:
    """Whatever stands between tiles: text, markers or nothing; and between two images without text, the same."""
    if case_id(subject.case) not in SPLIT:
        pytest.skip("its images have no tiles, or it is another variant of these")
    inputs, totals = subject.batch((5, 2, 7), (3, subject.kinds, 8)), SPLIT[case_id(subject.case)]
    plan = subject.plan([Stage("uniform", 0, keep_tokens=20), Stage("divprune", 3, keep_ratio=0.25)])
    attach(subject.model, plan)
    with record(subject.model) as trace:
        out = generate(subject.model, inputs, new=3)
    whole = generate(subject.model, inputs, new=3, use_cache=False)
    assert logit_gap(out, whole) < tolerance(subject.model)
    assert trace.stages[0].total == [totals[0]] * 3 + [totals[1]]
    assert trace.stages[0].vision_out == [20] * 4
    assert trace.stages[1].vision_out == [min(20, round(total / 4)) for total in trace.stages[0].total]
    assert [len(layouts) for layouts in trace.stages[0].layouts] == [1] * 4
    detach(subject.model)
    tiles = subject.plan([Stage("uniform", 0, keep_tokens=5)], scope="tile")
    attach(subject.model, tiles)
    with record(subject.model) as trace, torch.no_grad():
        subject.model(**inputs)
    assert [len(row.grids) for layouts in trace.stages[0].layouts for row in layouts] == [1] * len(
        trace.stages[0].total
    )
    assert len(trace.stages[0].total) > 4
    assert set(trace.stages[0].vision_out) == {5}
    detach(subject.model)
    check(subject.model, subject.base, tiles, inputs, modes=())


@some("smolvlm")
def test_a_plan_of_version_1_holds_per_tile_where_text_separates_tiles(subject: Subject, tmp_path: Path) -> None:
    """Exports of SmolVLM before version 2 were trained with a budget for each tile."""
    if subject.case[0] not in ("smolvlm", "internvl"):
        pytest.skip("one family of each kind")
    model, inputs = subject.model, subject.batch((5, ["wide"], 9))
    tp.attach(model, subject.plan([Stage("uniform", 0, keep_tokens=5)], scope="tile"))
    out = tp.export(model, make_processor(), tmp_path / "out", probe_inputs=inputs)
    config = json.loads((out / "config.json").read_text())
    assert config["token_pruning"]["version"] == 2
    config["token_pruning"] |= {"version": 1, "scope": "image"}
    (out / "config.json").write_text(json.dumps(config))
    (out / "manifest.json").unlink()
    scope = "tile" if subject.case[0] == "smolvlm" else "image"
    for options in ({}, {"keep_tokens": 4}):
        loaded = load(out, **options)
        assert tp.plan_of(loaded).scope == loaded.config.token_pruning["scope"] == scope
