"""Every rule on every family: exact counts on any images, and a choice that no batch partner changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structure import some
from subjects import Subject
from support import alone, pruner_configs

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.trace import StageTrace
from tpcompress.insertion.views.available import why_unavailable
from tpcompress.pruners import create, list_pruners

NAMES = [name for name, cls in list_pruners().items() if not cls.keeps_none]

# One of each kind: one square; tiles; any size with M-RoPE; two kinds of masks; states beside attention; a resampler.
QUICK = ("llava-clip_vision_model", "llava_next", "qwen2_5_vl", "gemma3", "lfm2_vl-lfm2", "idefics2")
every_family = some(*QUICK)


def placed(subject: Subject, name: str) -> Stage | None:
    """The first set of arguments with which a pruner works here, as early as it does; None if none does."""
    parts = resolve(subject.base)
    for config in pruner_configs():
        if config["type"] != name or config.get("resample"):
            continue
        rule = create(dict(config))
        layer = next((at for at in parts.stage_layers if why_unavailable(parts, rule, at) is None), None)
        if layer is not None:
            return Stage(rule, layer, keep_tokens=7)
    return None


def last_stage(subject: Subject, stage: Stage, inputs: dict[str, Any]) -> StageTrace:
    attach(subject.model, PruningPlan([stage]))
    try:
        with record(subject.model) as trace, torch.no_grad():
            logits = subject.model(**inputs).logits
    finally:
        detach(subject.model)
    assert logits.isfinite().all()
    return trace.stages[-1]


@every_family
@pytest.mark.parametrize("name", NAMES)
def test_exact_and_independent_of_the_batch(subject: Subject, name: str) -> None:
    stage = placed(subject, name)
    if stage is None:
        with pytest.raises(ValueError, match=f"^Pruner '{name}' needs [^\n]*$"):
            attach(subject.model, PruningPlan([Stage(name, 0, keep_tokens=7)]))
        return
    # Frames are pooled before the projector of the one family that has both.
    kinds = [kind for kind in subject.kinds if kind != "video" or "projector" not in stage.pruner.needs]
    samples = [(5, 1, 7), (6, kinds, 4), (3, 0, 5)]
    # Padded on the right: the norms of rotated keys, by which DART goes, differ at other positions.
    inputs = subject.batch(*samples, side="right")
    together = last_stage(subject, stage, inputs)
    assert together.vision_out == [min(7, total) for total in together.total]
    assert together.retained_RV.sum(1).tolist() == together.vision_out
    for b in (0, 1):
        rows = [row for row, owner in enumerate(together.owner) if owner == b]
        single = last_stage(subject, stage, alone(inputs, samples, b, *subject.case[:1], subject.config))
        assert single.total == [together.total[row] for row in rows]
        width = single.retained_RV.shape[1]
        assert torch.equal(single.retained_RV, together.retained_RV[rows, :width])


@every_family
def test_most_rules_work_on_any_family(subject: Subject) -> None:
    """What a family without a tower to look into lacks are the rules that read the tower, and no others."""
    lost = {name for name in NAMES if placed(subject, name) is None}
    tower = {"fastervlm", "vispruner", "visionzip", "prumerge", "holov", "hiprune", "hired", "globalcom2"}
    assert lost <= (tower if subject.family.tower is None else {"prumerge"})
