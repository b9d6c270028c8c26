"""What a plan makes of a batch is counted without the language model, and is what its stages do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from structure import some
from subjects import Subject

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.effect import effect_of
from tpcompress.insertion.plan import Stage

STAGES = [Stage("divprune", 0, keep_tokens=20), Stage("uniform", 3, keep_ratio=0.25)]


@some("llava-clip_vision_model", "smolvlm", "llava_onevision")
@pytest.mark.parametrize("scope", ["image", "tile", "prompt"])
def test_the_effect_is_what_the_stages_do(subject: Subject, scope: str) -> None:
    inputs = subject.batch((5, 1, 7), (3, subject.kinds, 8), (4, 0, 9)) | {"meta": "not a tensor"}
    plan = replace(subject.plan(STAGES), scope=scope)
    counted = effect_of(subject.model, inputs, plan)
    attach(subject.model, plan)
    attached = effect_of(subject.model, inputs)
    for name in ("lengths", "images", "totals", "owners", "retained"):
        assert getattr(attached, name) == getattr(counted, name)
    del inputs["meta"]
    with record(subject.model) as trace, torch.no_grad():
        subject.model(**inputs)
    assert counted.lengths == tuple(inputs["attention_mask"].sum(1).tolist())
    assert len(counted.images) == 1 + len(subject.kinds)
    for number, stage in enumerate(trace.stages):
        assert counted.totals == tuple(stage.total)
        assert counted.owners == tuple(stage.owner)
        assert counted.retained[number] == tuple(stage.vision_out)
        assert max(counted.sequence(number)) == stage.sequence_out
        assert stage.num_images == len(counted.images)
        assert stage.per_image == pytest.approx(sum(stage.vision_out) / len(counted.images))
        assert stage.per_sequence == pytest.approx(sum(stage.vision_out) / 2), "the third sample has no image"
    assert counted.sequence(1)[2] == counted.lengths[2]
    assert counted.prunes
